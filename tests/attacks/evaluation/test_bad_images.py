"""Images for which a model gives nothing finite: they are named, or left out and counted."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import APGD, FGSM, PGD, AutoAttack, AuxiliaryLoss, Square, evaluate
from ironmoe.moe import VMoE

BAD = (7, 33)


class Marked(nn.Module):
    """A linear model that fails at images whose first pixel is 1: in its answer, or in its
    gradient alone."""

    def __init__(self, kind="answer"):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        flat = x.flatten(1)
        logits = self.linear(flat)
        marked = (flat[:, :1] >= 0.999).to(x.dtype)
        if self.kind == "answer":
            return logits / (1 - marked)
        if self.kind == "nan":
            return torch.where(marked > 0, float("nan"), logits)
        nothing = flat[:, 1:2] - flat[:, 1:2].detach()
        return logits + torch.where(marked > 0, nothing, 1.0).sqrt() * marked  # √0 has no gradient


@pytest.fixture(params=["answer", "nan", "gradient"])
def model(request):
    torch.manual_seed(0)
    return Marked(request.param)


def data(model):
    x = 0.1 + 0.8 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    for number in BAD:
        x[number, 0, 0, 0] = 1
    y = model.linear(x.flatten(1)).argmax(1)
    return x, y


@pytest.mark.parametrize("batch_size", [5, 256])
def test_they_are_named_by_their_number_in_the_data(model, batch_size):
    arguments = {"batch_size": batch_size, "checks": False}
    with pytest.raises(ValueError, match=r"in the data number (7|33|7, 33)\b.*on_bad='skip'"):
        evaluate(model, data(model), {"f": FGSM(model, 1e-6)}, **arguments)


def test_all_of_a_batch_are_named_that_are_bad_at_the_same_step(model):
    images, labels = data(model)
    with pytest.raises(ValueError, match=r"got NaN for 2 .*number 107, 133;"):
        PGD(model, 1e-6, steps=3).run(images, labels, torch.arange(40) + 100)


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("batch_size", [5, 256])
def test_skipped_images_are_neither_robust_nor_fallen(model, batch_size, checks):
    attacks = {"pgd": PGD(model, 1e-6, steps=3), "apgd": APGD(model, 1e-6, steps=3)}
    arguments = {"batch_size": batch_size, "checks": checks, "on_bad": "skip"}
    report = evaluate(model, data(model), attacks, **arguments)

    assert report.skipped == list(BAD) and report.as_dict()["skipped"] == list(BAD)
    assert report.complete
    assert report.clean_accuracy.total == report.worst_case.total == 38
    assert report.worst_case.count == 38
    for summary in report.attacks.values():
        assert summary.robust_accuracy.total == 38 and summary.as_dict()["skipped"] == 2
        assert summary.decided.all() and not summary.fell.any()


def test_the_others_are_what_they_are_without_them(model):
    x, y = data(model)
    good = torch.tensor([number for number in range(40) if number not in BAD])
    attack = {"pgd": PGD(model, 0.3, steps=5, random_start=False)}
    with_them = evaluate(model, (x, y), attack, on_bad="skip").attacks["pgd"]
    alone = evaluate(model, (x[good], y[good]), attack).attacks["pgd"]
    assert torch.equal(with_them.fell[good], alone.fell)
    assert torch.equal(with_them.distance[good], alone.distance)


def test_black_box_attacks_need_no_gradient():
    torch.manual_seed(0)
    model = Marked("gradient")
    report = evaluate(
        model, data(model), {"s": Square(model, 1e-6, steps=5)}, on_bad="skip", checks=False
    )
    assert report.skipped == []


def test_one_attack_of_a_chain_skips_for_all(model):
    attack = AutoAttack(model, eps=1e-6, version="custom", attacks_to_run=["apgd-ce", "square"])
    attack.stages[:] = APGD(model, 1e-6, steps=5), Square(model, 1e-6, steps=20)
    report = evaluate(model, data(model), {"aa": attack}, on_bad="skip", checks=False)
    assert report.skipped == list(BAD)


def test_a_journal_remembers_who_was_skipped(model, tmp_path):
    arguments = (model, data(model), {"f": FGSM(model, 1e-6)})
    first = evaluate(*arguments, on_bad="skip", journal=tmp_path)
    again = evaluate(*arguments, on_bad="skip", journal=tmp_path)
    assert first.skipped == again.skipped == list(BAD)


def test_a_class_of_minus_infinity_is_no_bad_answer():
    torch.manual_seed(0)
    linear = nn.Linear(16, 3)

    def model(x):
        logits = linear(x.flatten(1))
        return torch.cat([logits, torch.full_like(logits[:, :1], float("-inf"))], 1)

    x = torch.rand(10, 1, 4, 4)
    report = evaluate(model, (x, model(x).argmax(1)), {"p": PGD(model, 0.01)}, on_bad="skip")
    assert report.skipped == [] and report.clean_accuracy.value == 1


def test_only_two_words_are_taken(model):
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', got 'ignore'"):
        evaluate(model, data(model), {"f": FGSM(model)}, on_bad="ignore")


def test_images_that_share_a_loss_with_a_bad_one_are_not_called_robust():
    """An auxiliary loss couples the search of a batch, which a bad image ends for all."""
    torch.manual_seed(0)
    inner = VMoE(
        image_size=4, patch_size=2, dim=8, depth=1, heads=2, mlp_dim=8, num_classes=3,
        moe_layers=(0,), num_experts=2, channels=1,
    )  # fmt: skip
    inner.head.weight.data.normal_()

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            marked = x.flatten(1)[:, :1] >= 0.999
            return torch.where(marked, float("nan"), self.inner(x))

    model = Failing().eval()
    x = 0.8 * torch.rand(16, 1, 4, 4)
    y = inner(x).argmax(1)
    x[5, 0, 0, 0] = 1
    attacks = {"pgd": PGD(model, 1e-6, steps=2, routing=AuxiliaryLoss(0.1))}
    report = evaluate(model, (x, y), attacks, batch_size=8, on_bad="skip")
    assert report.skipped == list(range(8))
    assert report.worst_case.total == 8


@pytest.mark.parametrize("checks", [False, True])
def test_the_look_at_a_model_names_them_by_their_number_in_the_data(checks):
    torch.manual_seed(0)
    model = Marked("nan")
    x, y = data(model)
    with pytest.raises(ValueError, match=r"in the data number 7, 33;.*on_bad='skip'"):
        evaluate(model, (x, y), {"f": FGSM(model, 1e-6)}, checks=checks)


@pytest.mark.parametrize("passes", [1, 64])
def test_what_only_an_attack_drives_to_nan_is_counted_apart(passes):
    """Of 40 images 2 are NaN from the start, and 3 near a border that the attack can reach."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 3)

    def model(x):
        flat = x.flatten(1)
        return torch.where(flat[:, :1] < 0.2, float("nan"), linear(flat))

    x = 0.3 + 0.6 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    x[[7, 33], 0, 0, 0] = 0.1
    x[[2, 5, 9], 0, 0, 0] = 0.2001
    y = linear(x.flatten(1)).argmax(1)
    y[[20, 21]] = (y[[20, 21]] + 1) % 3
    attacks = {
        "pgd": PGD(model, steps=3, restarts=4),
        "square": Square(model, steps=3),
    }
    report = evaluate(
        model, (x, y), attacks, eps=[1e-3], on_bad="skip", checks=False, passes=passes
    )
    driven = report.skipped_under_attack
    assert {*driven} <= {2, 5, 9} and driven and {*report.skipped} == {7, 33, *driven}

    held, fallen = report.worst_case_at(1e-3), report.if_skipped_fell_at(1e-3)
    assert fallen.total == held.total + len(driven)
    assert fallen.value * fallen.total == pytest.approx(held.value * held.total)
    (entry,) = report.as_dict()["if_skipped_fell"]
    assert entry["eps"] == 1e-3 and entry["total"] == fallen.total

    count = f"{len(driven)} image{'s' * (len(driven) > 1)} more gave nothing finite under attack"
    assert "2 images more gave nothing finite without any attack" in report.verdict
    assert count in report.verdict and f"{100 * fallen.value:.1f} % at 0.001" in report.verdict
    assert f"- {len(driven)} under attack alone: number {driven[0]}" in str(report)


def test_a_gradient_that_is_nan_at_the_first_question_counts_as_driven_there():
    torch.manual_seed(0)
    model = Marked("gradient")
    report = evaluate(model, data(model), {"f": FGSM(model, 1e-6)}, on_bad="skip", checks=False)
    assert report.skipped_under_attack == report.skipped == list(BAD)


def test_where_no_image_counts_no_check_and_no_sentence_claims_to_have_looked():
    def model(x):
        return x.flatten(1)[:, :3] * float("nan")

    x = torch.rand(6, 1, 4, 4)
    labels = torch.zeros(6, dtype=torch.int64)
    report = evaluate(model, (x, labels), {"pgd": PGD(model, 0.1, steps=2)}, on_bad="skip")
    states = {flag.name: flag.state for flag in report.checks}
    assert states["radius larger than the box"] == "not looked at"
    assert str(report.clean_accuracy) == "– [0.0, 100.0]" and "nan" not in str(report)
    assert report.skipped_under_attack == [] and "all were skipped: nothing" in report.verdict
