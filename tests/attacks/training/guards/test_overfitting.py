"""The guard fires where a single-step training collapses, and not by chance."""

import math

import pytest
import torch
from torch import nn
from training_toys import EPS, batch, digits, linear

from ironmoe.attacks.training import (
    AWP,
    FGSMRS,
    NFGSM,
    PGDAT,
    TRADES,
    Free,
    OverfittingGuard,
    Standard,
)
from ironmoe.attacks.training.guards.overfitting import chance

RADIUS = 0.2


class Sine(nn.Module):
    """sin 5x: a model of it can bend its loss within the ball, which is what a collapse needs."""

    def forward(self, x):
        return torch.sin(5 * x)


def small_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        Sine(),
        nn.Linear(128, 128),
        Sine(),
        nn.Linear(128, 10),
    )


def verdicts(method, epochs):
    """Of a guard after each epoch, until it trips."""
    (images, labels), held_out = digits(800, 150)
    guard = OverfittingGuard(method, *held_out)
    optimizer = torch.optim.Adam(method.model.parameters(), lr=3e-3)
    found = []
    for _ in range(epochs):
        for rows in torch.randperm(800).split(50):
            optimizer.zero_grad()
            method(images[rows], labels[rows]).backward()
            optimizer.step()
        found.append(guard.check())
        if found[-1].tripped:
            break
    return guard, found


@pytest.mark.parametrize("seed", range(4))
def test_it_fires_on_fgsm_that_collapses_and_gives_the_last_good_weights_back(seed):
    model = small_model(seed)
    guard, found = verdicts(FGSMRS(model, RADIUS, start="clean", alpha=RADIUS), 10)
    last = found[-1]
    assert last.tripped and len(found) > 1
    assert last.fgsm - last.pgd > 0.2 and last.alignment < 0.6
    assert "catastrophic overfitting: accuracy under PGD-10" in last.message
    assert "of 150 held-out images" in last.message

    guard.restore()
    again = guard.check()
    assert not again.tripped and again == found[-2]


@pytest.mark.parametrize("seed", range(2))
def test_it_does_not_fire_on_pgd_training_of_the_same_model(seed):
    _, found = verdicts(PGDAT(small_model(seed), RADIUS, steps=5, alpha=0.4 * RADIUS), 4)
    assert not any(each.tripped for each in found)
    assert found[-1].pgd > 0.15 and found[-1].alignment > 0.8


def test_an_attack_of_several_steps_that_is_weaker_than_pgd_is_no_collapse():
    _, found = verdicts(TRADES(small_model(0), RADIUS, steps=5, alpha=0.4 * RADIUS), 2)
    assert len(found) == 2 and found[-1].fgsm - found[-1].pgd > 0.2


class Told(nn.Module):
    """Says for each image what it is told to say; its gradient is 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.right = 0.0

    def forward(self, x):
        marks = (x.flatten(1)[:, 0] * 0 + torch.arange(len(x)) >= self.right * len(x)).float()
        return torch.stack([1 - marks, marks], 1) + self.w * x.flatten(1)[:, :2]


@pytest.mark.parametrize(("count", "trips"), [(10, False), (100, True)])
def test_a_fall_of_accuracy_must_be_more_than_chance_on_so_many_images(count, trips):
    """60 % fall to 30 %: three of ten images, p = 1/8, are no evidence, and 30 of 100 are."""
    model = Told()
    images, labels = torch.full((count, 1, 2, 2), 0.5), torch.zeros(count, dtype=torch.int64)
    guard = OverfittingGuard(FGSMRS(model, EPS), images, labels)
    model.right = 0.6
    assert not guard.check().tripped
    model.right = 0.3
    verdict = guard.check()
    assert verdict.pgd == pytest.approx(0.3) and verdict.tripped == trips
    assert f"of {count} held-out images" in verdict.message
    if trips:
        assert "30 points below that under PGD-10 at the last good check" in verdict.message


def test_a_small_fall_does_not_trip_and_the_next_check_is_compared_with_it():
    model = Told()
    images, labels = torch.full((100, 1, 2, 2), 0.5), torch.zeros(100, dtype=torch.int64)
    guard = OverfittingGuard(FGSMRS(model, EPS), images, labels)
    for share in (0.9, 0.72, 0.55, 0.4):
        model.right = share
        assert not guard.check().tripped
    model.right = 0.1
    assert guard.check().tripped


def test_within_a_ramp_the_attacks_have_its_eps_and_the_fall_is_that_at_the_full_one():
    """A linear margin of 0.3: robust at a quarter of the ramp, not at its end."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    images, labels = torch.full((100, 1, 4, 4), 0.5).double(), torch.zeros(100, dtype=torch.int64)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.5], [-0.5]]) / 16)
        model[1].bias.copy_(torch.tensor([-0.1, 0.1]))  # 0.5 − 0.2 = 0.3 before the attack
    method = FGSMRS(model, 0.4, ramp_steps=4, start="clean")
    guard = OverfittingGuard(method, images, labels)
    first = guard.check()
    assert (first.fgsm, first.pgd) == (1, 1) and not first.tripped
    method.step = 3
    last = guard.check()
    assert (last.fgsm, last.pgd) == (0, 0) and not last.tripped  # at 0.4 it never was robust


def test_chance_is_the_tail_of_the_binomial():
    assert chance(0, 0) == 1 and chance(3, 0) == 1 / 8
    expected = sum(math.comb(9, k) for k in (7, 8, 9)) / 2**9
    assert chance(7, 2) == pytest.approx(expected)


@pytest.mark.parametrize("make", [FGSMRS, NFGSM, PGDAT, TRADES, Free, Standard])
def test_a_check_of_any_method_leaves_model_and_random_numbers_alone(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    method = AWP(make(model, EPS, mode="train", ramp_steps=5))
    images, labels = batch(dtype=torch.float32)
    method(images, labels).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [weight.grad.clone() for weight in model.parameters()]
    step, state = method.step, torch.get_rng_state()

    first = OverfittingGuard(method, images, labels).check()
    assert first == OverfittingGuard(method, images, labels, batch_size=6).check()
    assert torch.equal(torch.get_rng_state(), state) and method.step == step
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    after = [weight.grad for weight in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True)) and model.training


def test_the_alignment_of_a_linear_margin_is_one():
    model, (images, labels) = linear(2), batch(classes=2)
    verdict = OverfittingGuard(FGSMRS(model, EPS), images, labels).check()
    assert verdict.alignment == pytest.approx(1.0)


def test_what_is_saved_goes_on():
    model, (images, labels) = linear(), batch(60)
    with torch.no_grad():
        labels = model(images).argmax(1)
    guard = OverfittingGuard(FGSMRS(model, 0.01), images, labels)
    good = [weight.detach().clone() for weight in model.parameters()]
    assert not guard.check().tripped
    later = OverfittingGuard(FGSMRS(model, 0.01), images, labels)
    later.load_state_dict(guard.state_dict())
    with torch.no_grad():
        model[1].weight.neg_()
        model[1].bias.neg_()
    verdict = later.check()
    assert verdict.tripped and "at the last good check" in verdict.message
    later.restore()
    assert all(torch.equal(a, b) for a, b in zip(good, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="state must belong to these 6 images, got 60"):
        OverfittingGuard(FGSMRS(model, EPS), *batch()).load_state_dict(guard.state_dict())


def test_bad_input():
    method, (images, labels) = FGSMRS(linear(), EPS), batch()
    with pytest.raises(RuntimeError, match="restore needs a check that was good"):
        OverfittingGuard(method, images, labels).restore()
    with pytest.raises(TypeError, match="method must be a TrainingMethod"):
        OverfittingGuard(linear(), images, labels)
    with pytest.raises(ValueError, match=r"drop must be in \(0, 1\), got 20"):
        OverfittingGuard(method, images, labels, drop=20)
    with pytest.raises(ValueError, match="steps must be"):
        OverfittingGuard(method, images, labels, steps=0)
    with pytest.raises(ValueError, match="at least one"):
        OverfittingGuard(method, images[:0], labels[:0])


def margins(scale, bias):
    """Two classes told by the mean of 16 pixels around 0.5: class 1 where
    scale · (mean − 0.5) + bias > 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    set_margins(model, scale, bias)
    return model


@torch.no_grad()
def set_margins(model, scale, bias):
    model[1].weight.copy_(torch.tensor([[0.0], [scale / 16]]).expand(2, 16))
    model[1].bias.copy_(torch.tensor([0.0, bias - scale / 2]))


def two_classes(count=100, share=0.6):
    """Images of class 0 are at 0.45, those of class 1 at 0.55: no model is robust at 0.1."""
    labels = (torch.arange(count) >= share * count).long()
    return (0.45 + 0.1 * labels.double()).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone(), labels


@pytest.mark.parametrize("ramp_steps", [0, 4])
def test_a_model_that_begins_to_learn_does_not_fall_from_one_class_for_every_image(ramp_steps):
    """60 of 100 images are of one class. To say so is right under any attack, and is nothing to
    lose."""
    model, (images, labels) = margins(1.0, -9.0), two_classes()
    method = FGSMRS(model, 0.1, ramp_steps=ramp_steps, start="clean")
    guard = OverfittingGuard(method, images, labels)
    first = guard.check()
    assert first.fgsm == first.pgd == pytest.approx(0.6) and not first.tripped
    set_margins(model, 1.0, 0.0)
    method.step = ramp_steps
    second = guard.check()
    assert (second.fgsm, second.pgd) == (0, 0) and not second.tripped


def test_a_fall_at_the_eps_of_the_last_good_check_trips_within_a_ramp():
    images, labels = two_classes()
    images = (images - 0.5) * 4 + 0.5  # at 0.3 and 0.7
    model = margins(1.0, 0.0)
    method = FGSMRS(model, 0.15, ramp_steps=2, start="clean", alpha=0.15)
    guard = OverfittingGuard(method, images, labels)
    assert guard.check().pgd == 1
    method.step = 1
    assert guard.check().pgd == 1  # at the full eps
    set_margins(model, 1.0, 0.1)  # class 0 is now told below 0.4, class 1 above
    verdict = guard.check()
    assert verdict.tripped and "below that under PGD-10 at the last good check" in verdict.message


@pytest.mark.parametrize(
    ("kind", "options"),
    [(FGSMRS, {"alpha": 1e-4, "start": "clean"}), (TRADES, {"steps": 1, "alpha": 1e-4})],
)
def test_an_own_attack_of_one_step_that_is_weak_is_no_collapse(kind, options):
    model, (images, labels) = margins(1.0, 0.0), two_classes()
    verdict = OverfittingGuard(kind(model, 0.1, **options), images, labels).check()
    assert (verdict.fgsm, verdict.pgd) == (0, 0) and not verdict.tripped
    assert "0.0% are told right under FGSM" in verdict.message
