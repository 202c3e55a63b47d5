"""Arguments that mean nothing, and tensors that autograd refuses."""

import math
import warnings

import pytest
import torch
from torch import nn
from training_toys import EPS, batch, linear, rows

from ironmoe.attacks import GatesOnly
from ironmoe.attacks.training import (
    EMA,
    FGSMRS,
    MART,
    PGDAT,
    TRADES,
    Alternating,
    CollapseAlarm,
    Free,
    Mixup,
    OverfittingGuard,
    Standard,
    fgsm_rs,
    kl_pgd,
    n_fgsm,
    pgd,
    vmoe_pgd,
)

ATTACKS = {
    "pgd": pgd,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "vmoe_pgd": lambda *args, **options: vmoe_pgd(*args, steps=2, **options),
    "kl_pgd": lambda model, images, labels, **options: kl_pgd(model, images, **options),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("eps", [0, -0.1, math.nan, math.inf, torch.tensor(-0.1)])
def test_an_inner_attack_needs_a_radius_above_0(name, eps):
    with pytest.raises(ValueError, match="eps must be finite and above 0, got"):
        ATTACKS[name](linear(), *batch(), eps=eps)


def test_an_inner_attack_needs_steps_and_their_length():
    images, labels = batch()
    for steps, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=r"steps must be (at least 1|a whole number), got"):
            pgd(linear(), images, labels, eps=EPS, steps=steps)
        with pytest.raises(error, match=r"steps must be (at least 1|a whole number), got"):
            PGDAT(linear(), EPS, steps=steps)
    with pytest.raises(ValueError, match=r"alpha must be finite and above 0, got -0\.1"):
        pgd(linear(), images, labels, eps=EPS, alpha=-0.1)
    with pytest.raises(TypeError, match=r"eps must be a number, got '0\.1'"):
        PGDAT(linear(), "0.1")
    with pytest.raises(ValueError, match="noise must be finite and at least 0, got -1"):
        n_fgsm(linear(), images, labels, eps=EPS, noise=-1)


def test_an_inner_attack_needs_images_and_as_many_labels():
    images, labels = batch()
    with pytest.raises(TypeError, match="images must be a float tensor"):
        pgd(linear(), images.byte(), labels, eps=EPS, bounds=None)
    with pytest.raises(TypeError, match=r"labels must be a tensor \(6, …\), got .* \(5,\)"):
        pgd(linear(), images, labels[:5], eps=EPS)
    with pytest.raises(ValueError, match="images must be at least one"):
        kl_pgd(linear(), images[:0], eps=EPS)
    with pytest.raises(ValueError, match=r"logits \(B, C\) of at least 2 classes, got \(6, 1\)"):
        kl_pgd(linear(classes=1), images, eps=EPS)


def test_counts_are_integers():
    with pytest.raises(TypeError, match=r"replays must be a whole number, got 2\.5"):
        Free(linear(), EPS, replays=2.5)
    with pytest.raises(TypeError, match=r"every must be a whole number, got 0\.5"):
        CollapseAlarm(0.5)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        EMA(linear)


@pytest.mark.parametrize("kind", [Standard, PGDAT, Free, TRADES, MART])
def test_inference_mode_gives_the_loss_without_a_graph(kind):
    images, labels = batch()
    method = kind(linear(), EPS)
    torch.manual_seed(0)
    expected = method(images, labels)

    with torch.inference_mode():
        torch.manual_seed(0)
        loss = method(images, labels)
        assert loss.allclose(expected) and not loss.requires_grad
        made_there = images.clone(), labels.clone()

    torch.manual_seed(0)
    loss = method(*made_there)
    loss.backward()
    assert torch.equal(loss, expected)
    assert method.model[1].weight.grad.any()


def test_inner_attacks_take_inference_tensors():
    images, labels = batch()
    model = linear()
    torch.manual_seed(0)
    expected = pgd(model, images, labels, eps=EPS, steps=2)
    with torch.inference_mode():
        torch.manual_seed(0)
        assert torch.equal(pgd(model, images, labels, eps=EPS, steps=2), expected)


def test_the_guard_looks_in_inference_mode_too():
    images, labels = batch()
    method = FGSMRS(linear(), EPS)
    expected = OverfittingGuard(method, images, labels).check()
    with torch.inference_mode():
        verdict = OverfittingGuard(method, images.clone(), labels.clone()).check()
    assert verdict == expected


def test_nothing_behind_images_and_labels_is_trained():
    images, _ = batch()
    teacher, shade = linear(), nn.Parameter(torch.ones((), dtype=torch.float64))
    soft = teacher(images).softmax(1)
    shaded = images * shade
    for method in (PGDAT(linear(), EPS), TRADES(linear(), EPS), Free(linear(), EPS)):
        for update in method.updates(shaded, soft):
            update.loss.backward()
    assert shade.grad is None and teacher[1].weight.grad is None
    soft.sum().backward()  # its graph is still there


def test_two_updates_of_images_that_have_a_graph():
    images, labels = batch()
    shade = nn.Parameter(torch.ones((), dtype=torch.float64))
    method = Alternating(rows(), EPS, steps=1)
    for update in method.updates(images * shade, labels):
        update.loss.backward()
    assert shade.grad is None


class Blind(nn.Module):
    """The gradient of its logits does not lead to the images."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, images):
        return self.linear(images.detach())


@pytest.mark.parametrize("kind", [PGDAT, Free, TRADES, MART])
def test_a_model_must_be_differentiable_with_respect_to_its_images(kind):
    with pytest.raises(ValueError, match="model must be differentiable with respect to its images"):
        kind(Blind(), EPS)(*batch())


def test_free_has_no_inner_attack_that_could_know_a_part_of_the_routing():
    with pytest.raises(ValueError, match="routing must be None for Free"):
        Free(rows(), EPS, routing=GatesOnly())
    Free(rows(), EPS, routing=None, mode="train")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_mixed_images_stay_inside_the_bounds(size):
    """Weights sum to 1 but for rounding, and white pixels are exactly 1."""
    torch.manual_seed(0)
    mix = Mixup(1.0, size=size, each=True)
    mixed, targets = mix(torch.ones(3000, 1, 1, 1), torch.zeros(3000, dtype=torch.int64), 2)
    assert mixed.max() == 1 and mixed.min() == 1
    torch.testing.assert_close(targets.sum(1), torch.ones(3000))


def test_labels_that_cannot_be_mixed_are_named():
    with pytest.raises(TypeError, match=r"labels must be int64 classes .* got .*int32"):
        Mixup(0.2)(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int32), 3)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 0.5), (-1.0, 1.0), None])
def test_standard_training_says_nothing_of_a_radius_that_nobody_gave(bounds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Standard(linear(), bounds=bounds)
    with pytest.raises(ValueError, match="bounds"):
        Standard(linear(), bounds=(1.0, 0.0))
