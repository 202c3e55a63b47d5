"""FGSM-RS, N-FGSM and Free, by closed forms on linear models."""

import pytest
import torch
from torch import nn
from training_toys import EPS, batch, linear, vmoe

from ironmoe.attacks.training import FGSMRS, NFGSM, Free, Standard, fgsm_rs, n_fgsm


def signs(model, images, labels):
    """Of the gradient of the cross-entropy to the images."""
    points = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(points), labels, reduction="sum")
    return torch.autograd.grad(loss, [points])[0].sign()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fgsm_rs_stays_inside_eps_and_is_the_function(norm):
    model, (images, labels) = linear(), batch(40)
    method = FGSMRS(model, EPS, norm=norm)
    assert (method.steps, method.alpha) == (1, 1.25 * EPS)
    torch.manual_seed(0)
    found = method.adversarial(images, labels)
    torch.manual_seed(0)
    assert torch.equal(found, fgsm_rs(model, images, labels, eps=EPS, norm=norm))
    order = torch.inf if norm == "Linf" else 2
    lengths = (found - images).flatten(1).norm(order, dim=1)
    assert lengths.max() <= EPS * (1 + 1e-12) and lengths.min() > EPS / 2


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_n_fgsm_goes_beyond_eps_up_to_the_noise_and_one_step(norm):
    model, (images, labels) = linear(), batch(40)
    method = NFGSM(model, EPS, norm=norm, bounds=None)
    torch.manual_seed(0)
    found = method.adversarial(images, labels)
    torch.manual_seed(0)
    expected = n_fgsm(model, images, labels, eps=EPS, norm=norm, bounds=None)
    assert torch.equal(found, expected)
    order = torch.inf if norm == "Linf" else 2
    lengths = (found - images).flatten(1).norm(order, dim=1)
    assert lengths.min() > EPS and EPS * 1.5 < lengths.max() <= 3 * EPS * (1 + 1e-9)
    quiet = NFGSM(model, EPS, noise=0, bounds=None)
    step = quiet.adversarial(images, labels) - images
    assert torch.allclose(step, EPS * signs(model, images, labels))


def test_free_with_one_replay_and_no_perturbation_yet_is_plain_training():
    model, (images, labels) = vmoe().double().train(), batch(4)
    images = images.repeat(1, 1, 2, 2)
    weights = list(model.parameters())
    gradients = []
    for method in (Free(model, EPS, replays=1), Standard(model)):
        torch.manual_seed(0)  # of the routers' noise
        gradients.append(torch.autograd.grad(method(images, labels), weights))
    found, expected = gradients
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_perturbation_of_free_moves_along_the_sign_and_lasts():
    model, (images, labels) = linear(), batch()
    free = Free(model, EPS, alpha=EPS / 4)
    for _ in range(free.replays + 2):  # the weights stay as they are, so the signs do
        free(images, labels).backward()
    step = EPS * signs(model, images, labels)
    assert torch.allclose(free.adversarial(images, labels), images + step)
    assert torch.equal(free.adversarial(images[:2], labels[:2]), images[:2] + step[:2])
    others = 1 - images  # the perturbation belongs to the place
    assert torch.allclose(free.adversarial(others, labels), others + step)


def test_an_l2_step_of_free_follows_the_direction_of_the_gradient():
    model, (images, labels) = linear(2), batch(classes=2)
    free = Free(model, EPS, norm="L2", bounds=None)
    for _ in range(2):
        free(images, labels).backward()
    weight = model[1].weight.detach()
    direction = nn.functional.normalize(weight[1 - labels] - weight[labels]).view_as(images)
    assert torch.allclose(free.adversarial(images, labels), images + EPS * direction)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_scaled_and_accumulated_losses_move_free_alike(norm):
    model, (images, labels) = linear(), batch()
    plain, scaled = (Free(model, EPS, norm=norm, alpha=EPS / 3) for _ in range(2))
    for _ in range(3):
        plain(images, labels).backward()
        (scaled(images, labels) * 2.0**16 / 5).backward()
    assert torch.allclose(plain.adversarial(images, labels), scaled.adversarial(images, labels))
    (scaled(images, labels) * torch.inf).backward()  # a GradScaler would skip the step
    assert scaled.adversarial(images, labels).isfinite().all()


def test_each_slot_of_free_has_its_own_rows_and_a_small_last_batch_takes_the_first():
    model, (images, labels) = linear(), batch()
    free = Free(model, EPS, replays=1)
    free(images, labels, slot=1).backward()
    free(images[:2], 2 - labels[:2], slot=0).backward()
    step = EPS * signs(model, images[:2], 2 - labels[:2])
    assert torch.allclose(free.adversarial(images[:2], labels[:2]), images[:2] + step)
    kept = free.state_dict()
    assert kept["delta.1"].shape == images.shape and kept["delta.0"].shape == images[:2].shape
    free(images, labels, slot=0).backward()  # a larger one begins at 0 where nothing is kept
    assert free.state_dict()["delta.0"].shape == images.shape


def test_updates_of_free_are_m_and_count_as_one_batch():
    model, (images, labels) = linear(), batch()
    free = Free(model, EPS, replays=3, ramp_steps=2)
    assert free.updates_per_batch == 3
    seen = []
    for update in free.updates(images, labels):
        assert update.group == "all"
        seen.append(free.step)
        update.loss.backward()
    assert len(seen) == 3 and free.step == 1
    moved = (free.adversarial(images, labels) - images).abs().max()
    assert moved == pytest.approx(EPS / 2)  # the ball of the first batch
    for _ in range(free.replays):
        assert free.step == 1
        free(images, labels).backward()
    assert free.step == 2
    assert (free.adversarial(images, labels) - images).abs().max() == pytest.approx(EPS)


def test_a_smaller_ball_pulls_the_perturbation_in():
    model, (images, labels) = linear(), batch()
    free = Free(model, EPS, ramp_steps=4)
    free.step = 3
    free(images, labels).backward()
    free.step = 0
    assert (free.adversarial(images, labels) - images).abs().max() == pytest.approx(EPS / 4)


@pytest.mark.parametrize("kind", [FGSMRS, NFGSM, Free])
def test_more_than_one_step_is_refused(kind):
    with pytest.raises(ValueError, match="steps must be 1 for a single-step method, got 4"):
        kind(linear(), EPS, steps=4)


def test_free_must_replay():
    with pytest.raises(ValueError, match="replays must be"):
        Free(linear(), EPS, replays=0)
    with pytest.raises(TypeError, match="replays must be a whole number"):
        Free(linear(), EPS, replays=2.5)
    with pytest.raises(ValueError, match="noise must be"):
        NFGSM(linear(), EPS, noise=-1)


def test_free_moves_to_the_radius_in_l1():
    model, (images, labels) = linear(), batch()
    method = Free(model, EPS, norm="L1", replays=2)
    for update in method.updates(images, labels):
        update.loss.backward()
    change = (method.adversarial(images, labels) - images).flatten(1)
    assert torch.allclose(change.norm(1, dim=1), torch.full((6,), EPS, dtype=torch.float64))
