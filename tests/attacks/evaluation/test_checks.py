"""Checks against false security: each has models that trip it and models that do not."""

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import APGD, FGSM, PGD, Square, check_model, check_outcome, evaluate
from ironmoe.moe import Capacity

EPS = 0.06


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs()
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


def tripped(model, data, **options):
    flags = check_model(PGD(model, EPS, **options), *data)
    return {flag.name for flag in flags if flag.tripped}


def test_a_plain_model_trips_none(model, data):
    assert tripped(model, data) == set()
    float32 = toys.mlp(data[0].float(), data[1]).float()
    assert tripped(float32, (data[0].float(), data[1])) == set()


def test_a_v_moe_trips_none(data):
    vmoe = toys.vmoe(data[0].float(), data[1])
    assert tripped(vmoe, data) == set()


def test_randomised(model, data):
    assert "randomised model" in tripped(lambda x: model(x + 0.05 * torch.rand_like(x)), data)


def test_non_determinism(model, data):
    calls = []

    def jittery(x):
        calls.append(1)
        return model(x) * (1 + 1e-9 * (len(calls) % 2))

    assert tripped(jittery, data) == {"forward non-determinism"}


def test_softmax(model, data):
    assert "softmax outputs" in tripped(lambda x: model(x).softmax(1), data)
    assert "softmax outputs" in tripped(lambda x: (9 * model(x)).sigmoid(), data)
    assert "softmax outputs" not in tripped(lambda x: 0.4 + 0.1 * model(x).tanh(), data)


def test_zero_gradients(model, data):
    assert "zero gradients" in tripped(lambda x: (1e4 * model(x)).float(), data)


def test_quantised_input(model, data):
    def rounded(x):
        return model(x + ((x * 15).round() / 15 - x).detach())

    assert tripped(rounded, data) == {"quantised input"}


@pytest.mark.parametrize("levels", [8, 255])
def test_an_input_that_is_rounded_without_a_gradient(model, data, levels):
    images = (data[0] * 255).round() / 255
    assert "quantised input" in tripped(
        lambda x: model((x * levels).round() / levels), (images, data[1])
    )
    for other in (
        lambda x: model(x.detach()) + 0 * x.flatten(1)[:, :4],
        lambda x: 0 * x.flatten(1)[:, :4],
    ):
        assert "quantised input" not in tripped(other, (images, data[1]))


def test_what_was_not_looked_at_says_so(model, data):
    few = check_model(PGD(model, EPS), data[0][:5], data[1][:5])
    assert "Not looked at" in next(flag.message for flag in few if flag.name == "quantised input")
    report = evaluate(model, data, {"pgd": PGD(model, 0.3)})
    messages = {flag.name: flag.message for flag in report.checks if flag.state == "not looked at"}
    # nothing held, and a dense model has no routing
    assert messages.keys() == {
        "Square beats the gradient attacks",
        "loss still rising at the end",
        "routing gradient blocked",
    }
    assert all(message.startswith("Not looked at: ") for message in messages.values())


def test_batch_dependence(model, data):
    assert "batch dependence" in tripped(lambda x: model(x - x.mean(0, keepdim=True)), data)
    coupled = toys.vmoe(data[0].float(), data[1], capacity=Capacity(0.5, images_per_group=4))
    assert "batch dependence" in tripped(coupled, data)


@pytest.mark.filterwarnings("ignore:top_k=1 and renormalize")
def test_routing_gradient(data):
    class Blocked(torch.nn.Module):
        """The best expert alone, its gate renormalised to 1: the router's logits do not show in the
        output."""

        def __init__(self):
            super().__init__()
            self.inner = toys.vmoe(data[0].float(), data[1], router={"renormalize": True}, top_k=1)

        def forward(self, x):
            return self.inner(x)

    assert tripped(Blocked(), data) == {"routing gradient blocked"}


def test_classes(data):
    two = toys.mlp(data[0].float(), data[1] % 2)
    from ironmoe.attacks import APGD

    flags = check_model(APGD(two, EPS, targets=9), data[0], data[1] % 2)
    assert {flag.name for flag in flags if flag.tripped} == {"fewer classes than the loss needs"}
    assert all(flag.message for flag in flags)


def test_loss_still_rising(model, data):
    crawling = evaluate(
        model, data, {"pgd": PGD(model, 0.03, alpha=0.0005, steps=10, random_start=False)}
    )
    settled = evaluate(model, data, {"pgd": PGD(model, 0.02, steps=40)})
    names = [
        {flag.name for flag in report.checks if flag.tripped} for report in (crawling, settled)
    ]
    assert names == [{"loss still rising at the end"}, set()]


def test_square_beats_the_gradient(model, data):
    from ironmoe.attacks import Square

    def masked(x):
        return model(x.detach() + 0 * x)  # gradients of 0 everywhere

    report = evaluate(
        masked, data, {"pgd": PGD(masked, 0.15), "square": Square(masked, 0.15, steps=100)}
    )
    tripped = {flag.name for flag in report.checks if flag.tripped}
    assert {"Square beats the gradient attacks", "zero gradients"} <= tripped
    honest = evaluate(
        model, data, {"pgd": PGD(model, 0.15, steps=20), "square": Square(model, 0.15, steps=100)}
    )
    assert not {flag.name for flag in honest.checks if flag.tripped} & tripped


def test_a_search_in_low_precision_says_nothing_of_the_model(data):
    images, labels = data[0].float(), data[1]
    for plain in (toys.mlp(images, labels).float(), toys.vmoe(images, labels).float()):
        assert tripped(plain, (images, labels), attack_dtype=torch.bfloat16) == set()


def test_a_model_that_is_very_sure_blocks_no_routing(data):
    vmoe = toys.vmoe(data[0].float(), data[1])

    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vmoe

        def forward(self, x):
            return 10 * self.inner(x)

    assert "routing gradient blocked" not in tripped(Sure(), data)


def test_softmax_of_low_precision(data):
    images, labels = data[0].float(), data[1]
    inner = toys.mlp(images, labels).bfloat16()
    assert "softmax outputs" in tripped(lambda x: inner(x).softmax(1), (images.bfloat16(), labels))


def test_one_image_has_no_company(model, data):
    flags = {flag.name: flag for flag in check_model(PGD(model, EPS), data[0][:1], data[1][:1])}
    assert (
        not flags["batch dependence"].tripped and "no company" in flags["batch dependence"].message
    )


def test_batches_of_one_image_are_looked_at_together(model, data):
    """A data loader of batch size 1 leaves the checks more than one image."""

    def coupled(x):
        return model(x - x.mean(0, keepdim=True))

    loader = [(image[None], label[None]) for image, label in zip(*data, strict=True)]
    report = evaluate(coupled, loader, {"f": FGSM(coupled, EPS)})
    assert "batch dependence" in {flag.name for flag in report.checks if flag.tripped}


def test_classes_of_every_attack_count(data):
    model = toys.mlp(data[0].float(), data[1])
    report = evaluate(
        model,
        data,
        {"pgd": PGD(model, EPS, steps=2), "apgd-t": APGD(model, EPS, steps=2, targets=9)},
    )
    assert "fewer classes than the loss needs" in {
        flag.name for flag in report.checks if flag.tripped
    }
    two = toys.mlp(data[0].float(), data[1] % 2)
    flags = check_model(PGD(two, EPS, loss="dlr"), data[0], data[1] % 2)
    assert "fewer classes than the loss needs" in {flag.name for flag in flags if flag.tripped}


def test_an_attack_cut_off_by_a_budget_is_not_beaten(model, data):
    """Square broke images that the gradient attack had no time for."""
    attacks = {"pgd": PGD(model, 0.01, steps=20), "square": Square(model, 0.01, steps=60)}
    report = evaluate(model, data, attacks, checks=False)
    pgd, square = report.attacks.values()
    assert pgd.robust.all()
    square.fell[:30], square.passed[:30] = True, 0
    for decided, expected in ((120, 30 / 120), (10, 10 / 120), (0, 0.0)):
        pgd.decided[:] = torch.arange(120) < decided
        flag = next(flag for flag in check_outcome(report) if flag.name.startswith("Square"))
        assert flag.value == pytest.approx(expected) and flag.tripped == (expected > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_reach_the_model_as_they_are(data, dtype):
    images, labels = data[0].to(dtype), data[1]
    inner = toys.mlp(data[0].float(), labels).to(dtype)
    seen = set()

    def model(x):
        seen.add(x.dtype)
        return inner(x)

    report = evaluate(model, (images, labels), {"pgd": PGD(model, EPS, steps=3)})
    assert seen == {dtype} and report.clean_accuracy.count > 100


def test_gradients_that_only_the_checks_take_do_not_end_an_attack_without(model, data):
    """Nor does what an earlier run left behind."""

    def broken(x):
        # the slope of a root at 0
        return model(x) + 0 * (x - x).abs().sqrt().flatten(1).sum(1, keepdim=True)

    report = evaluate(broken, data, {"square": Square(broken, EPS, steps=5)})
    assert report.complete
    attack = PGD(broken, EPS, steps=2)
    with pytest.raises(ValueError, match="finite input gradients"):
        attack.run(*data)
    attack.attacked_model.model = model
    assert attack.run(*data).clean_correct.any()


def test_labels_beyond_the_classes_are_named_before_anything_else(model, data):
    for checks in (True, False):
        with pytest.raises(ValueError, match="labels must be below the model's 4 classes, got 4"):
            evaluate(model, (data[0], data[1] + 1), {"pgd": PGD(model, EPS)}, checks=checks)
    with pytest.raises(ValueError, match="at least 2 classes for an attack with targets"):
        APGD(lambda x: x.flatten(1)[:, :1], EPS, targets=3).run(data[0], torch.zeros_like(data[1]))
