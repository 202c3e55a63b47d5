"""Training methods by closed forms, and what all of them share."""

import copy
import warnings

import pytest
import torch
from torch import nn
from training_toys import EPS, batch, linear, vmoe

from ironmoe.attacks.training import (
    PGDAT,
    TRADES,
    Alternating,
    Mixup,
    NonFiniteLoss,
    Standard,
    pgd,
)
from ironmoe.attacks.training.inner.attacks import kl_divergence
from ironmoe.moe import Capacity, collect_aux_loss


def test_the_loss_of_pgd_at_on_a_linear_model_is_that_at_a_margin_shortened_by_the_l1_norm():
    model, (images, labels) = linear(2), batch(classes=2)
    loss = PGDAT(model, EPS, steps=3, alpha=EPS, bounds=None)(images, labels)
    weight, logits = model[1].weight, model(images)
    margin = (logits[:, 0] - logits[:, 1]) * (1 - 2 * labels)
    shortened = margin - EPS * (weight[0] - weight[1]).abs().sum()
    assert torch.allclose(loss, nn.functional.softplus(-shortened).mean())


@pytest.mark.parametrize(("auxiliary", "expected"), [(False, 1.396), (True, 1.4)])
def test_the_vectors_of_the_official_trainer(auxiliary, expected):
    """One weight, w = 1, x = (−1, 0, 1), y = (−2, 0, 2), and the sum of squares as a loss."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
            self.aux_loss = None

        def forward(self, x):
            y = self.w * x
            if attacks:
                self.aux_loss = y.square().sum()
            return y

    model = Scale()
    attacks = auxiliary
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[-2.0], [0.0], [2.0]])
    method = PGDAT.vmoe(
        model,
        EPS,
        steps=10,
        attack_auxiliary_loss=auxiliary,
        auxiliary_loss=False,
        loss=lambda outputs, targets: 3 * (outputs - targets).square().sum(1),
    )
    method(x, y).backward()
    torch.optim.SGD([model.w], lr=0.1).step()
    assert model.w.item() == pytest.approx(expected, abs=1e-6)


def test_trades_adds_the_divergence_and_both_passes_train():
    model, (images, labels) = linear(), batch()
    method = TRADES(model, EPS, beta=3)
    torch.manual_seed(0)
    loss = method(images, labels)
    torch.manual_seed(0)
    points = method.adversarial(images, labels)
    clean = model(images)
    expected = nn.functional.cross_entropy(clean, labels)
    expected = expected + 3 * kl_divergence(clean, model(points)).mean()
    assert torch.allclose(loss, expected)
    (found,) = torch.autograd.grad(loss, [model[1].weight])
    assert torch.allclose(found, torch.autograd.grad(expected, [model[1].weight])[0])


def test_the_auxiliary_loss_comes_from_the_outer_pass_alone():
    model = vmoe(router={"noise_std": 0.0, "balance_weight": 0.1}).train()
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    torch.manual_seed(0)
    method = PGDAT(model, EPS, steps=2)
    loss = method(images, labels)
    torch.manual_seed(0)
    logits = model(method.adversarial(images, labels))
    expected = nn.functional.cross_entropy(logits, labels) + collect_aux_loss(model)
    assert torch.equal(loss, expected) and not collect_aux_loss(model)

    own = PGDAT(model, EPS, steps=2, auxiliary_loss=False)
    torch.manual_seed(0)
    assert torch.equal(own(images, labels) + collect_aux_loss(model), expected)


def test_eps_grows_with_the_batches():
    method = PGDAT(linear(), EPS, ramp_steps=4, alpha=EPS / 2)
    seen = []
    for _ in range(5):
        seen.append(method.strength)
        method(*batch())
    assert [each.eps for each in seen] == pytest.approx([EPS * min(1, t / 4) for t in range(1, 6)])
    assert [each.alpha * 2 for each in seen] == pytest.approx([each.eps for each in seen])
    later = PGDAT(linear(), EPS, ramp_steps=4)
    later.load_state_dict(method.state_dict())
    assert later.step == 5


def test_a_plain_loop_learns_and_the_model_stays_in_its_mode():
    model, (images, labels) = linear(dtype=torch.float32), batch(30, dtype=torch.float32)
    method = PGDAT(model, 0.02, steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        loss = method(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and model.training
    assert method.last["adversarial_correct"].shape == (30,)


def test_mixup_mixes_before_the_attack_or_after_it():
    model, (images, labels) = linear(), batch()
    torch.manual_seed(3)
    _, targets = Mixup(0.5)(images, labels, 3)
    assert torch.allclose(targets.sum(1), torch.ones(6)) and (targets.argmax(1) == labels).all()
    for first in (True, False):
        method = PGDAT(model, EPS, mixup=Mixup(0.5), mixup_first=first, start="clean")
        torch.manual_seed(3)
        loss = method(images, labels)
        torch.manual_seed(3)
        if first:
            points, targets = Mixup(0.5)(images, labels, 3)
            points = pgd(model, points, targets, eps=EPS, start="clean")
        else:
            points = pgd(model, images, labels, eps=EPS, start="clean")
            points, targets = Mixup(0.5)(points, labels, 3)
        assert torch.allclose(loss, nn.functional.cross_entropy(model(points), targets))


def test_mixup_counts_the_classes_of_a_model_with_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).double()
    PGDAT.vmoe(model, EPS, steps=1, mixup=Mixup(0.5))(*batch()).backward()
    assert (
        model[1].num_batches_tracked == 2
    )  # of the inner attack in training mode, and of the loss


def test_label_smoothing_is_that_of_torch():
    model, (images, labels) = linear(), batch()
    loss = Standard(model, label_smoothing=0.2)(images, labels)
    expected = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.2)
    assert torch.equal(loss, expected)


def test_autocast_of_the_loop_or_of_the_method_gives_the_same():
    model = linear(dtype=torch.float32)
    images, labels = batch(dtype=torch.float32)
    torch.manual_seed(0)
    own = PGDAT(model, EPS, autocast_dtype=torch.bfloat16)(images, labels)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = PGDAT(model, EPS)(images, labels)
    assert torch.equal(own, around)
    around.backward()
    assert model[1].weight.grad is not None  # no cast without a graph was kept


def test_capacity_works_and_the_user_is_told_what_it_means():
    model = vmoe(capacity=Capacity(1.0, images_per_group=2))
    with pytest.warns(UserWarning, match="places from each other") as caught:
        method = PGDAT(model, EPS, steps=1)
        Alternating(model, EPS)
    assert {warning.filename for warning in caught} == {__file__}  # the user's line
    method(torch.rand(4, 1, 8, 8), torch.arange(4)).backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps must be finite and above 0, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
        ({"alpha": -1.0}, ValueError, "alpha must be"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number, got 2.5"),
        ({"mode": "test"}, ValueError, "mode must be"),
        ({"norm": "L7"}, ValueError, "norm must be one of"),
        ({"ramp_steps": -1}, ValueError, "ramp_steps must be"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be"),
        ({"start": "middle"}, ValueError, "start must be"),
        ({"mixup": 0.2}, TypeError, "mixup must be a Mixup or None, got 0.2"),
        ({"autocast_dtype": torch.float64}, ValueError, "autocast_dtype must be None, torch.bf"),
        ({"loss": "nothing"}, ValueError, "loss must be one of"),
        ({"model": lambda x: x}, TypeError, "model must be an nn.Module"),
    ],
)
def test_settings_that_are_none(options, error, message):
    arguments = {"model": linear(), "eps": EPS} | options
    with pytest.raises(error, match=message):
        PGDAT(arguments.pop("model"), arguments.pop("eps"), **arguments)


def test_a_radius_wider_than_the_pixels_is_warned_of_once_for_the_line_that_gave_it():
    with pytest.warns(UserWarning, match="eps = 8 is more than the range of the pixels") as caught:
        TRADES(linear(), 8)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGDAT(linear(), 8, bounds=(0, 255))
        PGDAT(linear(), 8, bounds=None)
        PGDAT(linear(), 8, norm="L2")
        PGDAT(linear(), 1.0)


def test_a_method_of_ones_own_that_returns_no_scalar_is_told_so():
    class Own(PGDAT):
        def _losses(self, images, labels, points):
            return self._logits(points, images)

    with pytest.raises(TypeError, match=r"Own._losses must return a scalar tensor, got .*\(6, 3\)"):
        Own(linear(), EPS)(*batch())


def test_a_pixel_just_outside_the_bounds_is_told_in_full():
    images, labels = batch(dtype=torch.float32)
    images[0, 0, 0, 0] = 1 + 1e-6
    with pytest.raises(ValueError, match=r"to 1\.00000095; give bounds="):
        PGDAT(linear().float(), EPS)(images, labels)


class Rounded(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1).detach().round())


@pytest.mark.parametrize(
    ("model", "images", "labels", "message"),
    [
        (linear(), lambda x: x + 1, lambda y: y, "images must lie between the bounds"),
        (linear(), lambda x: x * torch.nan, lambda y: y, "images must lie between the bounds"),
        (linear(), lambda x: x, lambda y: y + 1, "labels must be from 0 to 2"),
        (linear(), lambda x: x, lambda y: y[:2], "labels must be a tensor"),
        (linear(), lambda x: x[:0], lambda y: y[:0], "at least one"),
        (linear(1), lambda x: x, lambda y: y * 0, "at least 2 classes"),
        (Rounded(16, 3).double(), lambda x: x, lambda y: y, "must be differentiable"),
    ],
)
def test_batches_that_cannot_be_trained_on(model, images, labels, message):
    x, y = batch()
    with pytest.raises((ValueError, TypeError), match=message):
        PGDAT(model, EPS)(images(x), labels(y))


def test_a_batch_of_one_with_batch_norm_is_refused_and_others_are_not():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    images, labels = batch(dtype=torch.float32)
    method = PGDAT(model, EPS, steps=1)
    with pytest.raises(ValueError, match="images must be at least 2 where batch norm trains"):
        method(images[:1], labels[:1])
    method(images, labels)
    model[1].eval()
    method(images[:1], labels[:1])


def test_a_loss_that_is_nan_names_layer_and_step_and_leaves_the_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    images, labels = batch(dtype=torch.float32)
    method = PGDAT(model, EPS, steps=1)
    method(images, labels)
    with torch.no_grad():
        model[1].bias[3] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"at step 1; the output of '1'") as caught:
        method(images, labels)
    assert (caught.value.layer, caught.value.step) == ("1", 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_layer_that_is_nan_in_training_mode_alone_is_named():
    class Broken(nn.Module):
        def forward(self, x):
            return x * torch.nan if self.training else x

    model = nn.Sequential(nn.Flatten(), Broken(), nn.Linear(16, 3)).train()
    images, labels = batch(dtype=torch.float32)
    with pytest.raises(NonFiniteLoss, match="the output of '1' is the first"):
        PGDAT(model, EPS, steps=1)(images, labels)
    assert model.training


def test_no_warning_comes_from_a_usual_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = vmoe().train()
        PGDAT(model, EPS, steps=1)(torch.rand(2, 1, 8, 8), torch.arange(2)).backward()
        assert all(weight.grad is not None for weight in model.parameters())
