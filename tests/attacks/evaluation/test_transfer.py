"""Transfer: the search runs on one model, and another one is evaluated."""

import pytest
import torch
import toys
from conformance import labels_of
from torch import nn

from ironmoe.attacks import (
    APGD,
    FAB,
    FGSM,
    MIFGSM,
    PGD,
    AutoAttack,
    HopSkipJump,
    JournalError,
    Square,
    evaluate,
)
from ironmoe.moe import Capacity, VMoE

EPS = 0.1


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(60, noise=0.2)
    return images.double(), labels


@pytest.fixture(scope="module")
def models(data):
    """(the one that is searched on, the one that is evaluated)"""
    return tuple(toys.mlp(data[0].float(), data[1], seed) for seed in (0, 1))


class Counting(nn.Module):
    """Keeps every image that it is asked about."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.asked = []
        self.with_grad = 0

    def forward(self, x):
        self.asked += list(x.detach().clone())
        self.with_grad += x.requires_grad * len(x)
        return self.body(x)


ATTACKS = {
    "fgsm": lambda m: FGSM(m, EPS),
    "pgd": lambda m: PGD(m, EPS, steps=6, restarts=2),
    "mifgsm": lambda m: MIFGSM(m, EPS, steps=6),
    "apgd-t": lambda m: APGD(m, EPS, steps=6, targets=2),
    "square": lambda m: Square(m, EPS, steps=20),
    "fab": lambda m: FAB(m, EPS, steps=5, targets=2),
    "hopskipjump": lambda m: HopSkipJump(m, EPS, steps=2),
    "torchattacks": lambda m: PGD.torchattacks(m, EPS, steps=4, random_start=False),
    "autoattack": lambda m: AutoAttack(
        m, eps=EPS, version="custom", attacks_to_run=["apgd-ce", "square"]
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_target_is_asked_about_clean_and_final_images_alone(data, models, name):
    """Once about each clean image, once about each attempt, and never for a gradient; passes are
    counted of both models."""
    images, labels = data
    source, target = map(Counting, models)
    attack = ATTACKS[name](source)
    for stage in attack.stages:
        if "autoattack" in name:
            stage.steps = stage.max_queries = min(stage.steps, 5)
    report = evaluate(
        target,
        data,
        {name: attack},
        search_model=source,
        checks=False,
        keep_adversarial=True,
        batch_size=16,
    )
    summary = report.attacks[name]
    attempts = sum(stage.restarts * max(stage.targets, 1) for stage in attack.stages)
    assert target.with_grad == 0
    assert len(images) < len(target.asked) <= (1 + attempts) * len(images)
    assert summary.forwards == len(source.asked) + len(target.asked)
    assert summary.backwards == source.with_grad

    right = labels_of(models[1], images) == labels
    assert torch.equal(summary.clean_correct, right)
    fell = labels_of(models[1], summary.adversarial) != labels
    assert torch.equal(summary.fell, fell & right)
    assert torch.equal(summary.prediction, labels_of(models[1], summary.adversarial))
    if name in ("fgsm", "pgd", "mifgsm", "apgd-t"):
        assert summary.fell.sum() > 40
    known = {image.numpy().tobytes() for image in target.asked}
    assert all(image.numpy().tobytes() in known for image in summary.adversarial)


def test_an_attack_that_would_stop_at_a_success_goes_on_to_its_best_point(data, models):
    """So PGD transfers as well as if it had been told to go all the way, and far better than what
    it finds when it stops."""
    images, labels = data
    source, target = models
    reports = {}
    for early_stop in (True, False):
        attack = {"pgd": PGD(source, EPS, steps=10, early_stop=early_stop)}
        reports[early_stop] = evaluate(
            target, data, attack, search_model=source, checks=False, keep_adversarial=True
        ).attacks["pgd"]
    assert torch.equal(reports[True].fell, reports[False].fell)

    stopped = PGD(source, EPS, steps=10)(images, labels)
    right = reports[True].clean_correct
    fell_where_it_stopped = (labels_of(target, stopped) != labels) & right
    assert reports[True].fell.sum() > fell_where_it_stopped.sum() + 10


def test_the_best_point_is_the_one_of_the_highest_loss_on_the_source(data, models):
    """As computed by hand, from a plain loop."""
    images, labels = data
    source, target = models
    steps, alpha = 5, EPS / 3
    report = evaluate(
        target,
        data,
        {"pgd": PGD(source, EPS, alpha, steps=steps, random_start=False)},
        search_model=source,
        checks=False,
        keep_adversarial=True,
    )

    point, best, candidate = images.clone(), torch.full((60,), -1.0).double(), images.clone()
    for step in range(steps + 1):
        point.requires_grad_()
        logits = source(point)
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        # Successes come before all others.
        loss_or_more = loss.detach() + 1e3 * (logits.argmax(1) != labels)
        better = (loss_or_more > best) & (step > 0)
        best = torch.where(better, loss_or_more, best)
        candidate[better] = point.detach()[better]
        (grad,) = torch.autograd.grad(loss.sum(), [point])
        moved = point.detach() + alpha * grad.sign()
        point = moved.clamp(images - EPS, images + EPS).clamp(0, 1)
    right = labels_of(target, images) == labels
    expected = torch.where(right[:, None, None, None], candidate, images)
    summary = report.attacks["pgd"]
    torch.testing.assert_close(summary.adversarial, expected, rtol=0, atol=1e-6)
    assert torch.equal(summary.fell, right & (labels_of(target, expected) != labels))


def test_found_says_what_fooled_the_source_and_fell_what_fooled_the_target(data, models):
    source, target = models
    attack = PGD(source, EPS, steps=6, early_stop=False)
    report = evaluate(target, data, {"pgd": attack}, search_model=source, checks=False)
    summary = report.attacks["pgd"]
    white_box = attack.run(*data)
    both_right = summary.clean_correct & white_box.clean_correct
    assert torch.equal(summary.found[both_right], (white_box.found | summary.fell)[both_right])
    assert summary.found.sum() > summary.fell.sum()


def test_the_targets_of_an_attack_are_ranked_by_the_source(data, models):
    """The target gives labels alone, and the search still knows which classes are likely."""
    source, target = models

    def labels_alone(x):
        return target(x).argmax(1)

    for attack in (APGD(source, EPS, steps=5, targets=2), FAB(source, EPS, steps=5, targets=2)):
        seen, unseen = (
            evaluate(
                asked,
                data,
                {"a": attack},
                search_model=source,
                checks=False,
                keep_adversarial=True,
            ).attacks["a"]
            for asked in (target, labels_alone)
        )
        assert torch.equal(seen.fell, unseen.fell)
        assert torch.equal(seen.adversarial, unseen.adversarial)
        assert seen.forwards == unseen.forwards


def test_a_transfer_does_not_depend_on_batches_and_goes_on_from_a_journal(data, models, tmp_path):
    source, target = models

    def run(model=target, **options):
        attack = {"pgd": PGD(source, EPS, steps=5, restarts=2)}
        options = {"search_model": source, "checks": False, "keep_adversarial": True} | options
        return evaluate(model, data, attack, **options).attacks["pgd"]

    whole = run()
    small = run(batch_size=7, journal=tmp_path)
    file = tmp_path / "journal-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: len(lines) // 2]))
    resumed = run(journal=tmp_path)
    for other in (small, resumed):
        assert torch.equal(whole.fell, other.fell)
        torch.testing.assert_close(whole.adversarial, other.adversarial, rtol=0, atol=1e-7)

    with pytest.raises(JournalError):
        run(model=source, search_model=None, journal=tmp_path)
    with pytest.raises(JournalError):
        run(model=toys.mlp(data[0].float(), data[1], 2), journal=tmp_path)


def test_a_budget_counts_the_passes_of_both_models(data, models):
    source, target = map(Counting, models)
    attack = {"pgd": PGD(source, EPS, steps=20)}
    report = evaluate(
        target, data, attack, search_model=source, checks=False, batch_size=20, max_forwards=500
    )
    assert not report.complete
    assert len(source.asked) + len(target.asked) <= 500


def test_a_report_says_that_it_is_about_a_transfer(data, models):
    source, target = models
    report = evaluate(target, data, [FGSM(source, EPS)], search_model=source, checks=False)
    assert report.search_model == report.as_dict()["search_model"] == "Sequential"
    assert list(report.attacks) == [
        f"FGSM(Linf, eps={EPS}, steps=1, restarts=1, seed=0), search_model=Sequential"
    ]
    looked = evaluate(target, data, [FGSM(source, EPS)], search_model=source)
    (flag,) = [flag for flag in looked.checks if flag.name == "transfer"]
    assert flag.tripped and "another model (Sequential)" in flag.message
    plain = evaluate(source, data, [FGSM(source, EPS)])
    assert "transfer" not in {flag.name for flag in plain.checks}
    assert plain.as_dict()["search_model"] is None


def test_a_random_target_is_judged_over_many_passes(data, models):
    """The source is not, and eot is about the source alone."""
    source, target = models

    class Random(nn.Module):
        def forward(self, x):
            flip = torch.rand(len(x)) < 0.1
            return torch.where(flip[:, None], -1, 1) * target(x)

    attack = {"pgd": PGD(source, 1e-6, steps=2, eot=2)}
    report = evaluate(Random(), data, attack, search_model=source)
    assert report.passes == 64
    right = labels_of(target, data[0]) == data[1]
    assert abs(report.attacks["pgd"].robust_accuracy.value - 0.9 * right.double().mean()) < 0.05
    exact = evaluate(target, data, attack, search_model=source)
    assert exact.passes == 1


def test_what_is_no_transfer_is_refused(data, models):
    source, target = models
    attack = {"a": FGSM(target, EPS)}
    with pytest.raises(ValueError, match="must be made for search_model, got one for another"):
        evaluate(target, data, attack, search_model=source)

    coupled = VMoE(
        12,
        4,
        24,
        2,
        2,
        32,
        4,
        moe_layers=(1,),
        num_experts=4,
        channels=1,
        capacity=Capacity(0.5, images_per_group=4, multiple_of=1),
    )
    with pytest.raises(ValueError, match="model must judge each image by itself in a transfer"):
        evaluate(coupled, data, {"a": FGSM(source, EPS)}, search_model=source)
    with pytest.raises(ValueError, match="search_model must judge each image by itself"):
        evaluate(source, data, {"a": FGSM(coupled, EPS)}, search_model=coupled)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_a_source_with_fewer_classes_than_labels_is_refused(data, models, loss):
    source = nn.Sequential(nn.Flatten(), nn.Linear(data[0][0].numel(), 3)).double()
    attacks = [PGD(source, EPS, loss=loss)]
    with pytest.raises(ValueError, match="labels must be below the model's 3 classes, got 3"):
        evaluate(models[1].double(), data, attacks, search_model=source)


def test_both_models_come_back_as_they_were(data, models):
    source, target = (nn.Sequential(model, nn.Dropout(0.0)).train() for model in models)
    evaluate(target, data, {"a": PGD(source, EPS, steps=2)}, search_model=source, checks=False)
    for model in (source, target):
        assert all(module.training for module in (model, model[1]))
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())
