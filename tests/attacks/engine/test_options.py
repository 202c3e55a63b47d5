"""Options of every attack: targets of the user, random models, normalisation, outputs that are no
tensor, the presets."""

from types import SimpleNamespace

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import APGD, MIFGSM, PGD, Square, evaluate


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(60)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


@pytest.mark.parametrize("make", [PGD, MIFGSM, APGD])
def test_targeted_attacks_reach_the_class_they_are_given(model, data, make):
    images, labels = data
    targets = (labels + 1) % 4
    result = make(model, 0.2, steps=20, targeted=True).run(images, targets)
    # not the target yet: to be attacked
    assert result.success.float().mean() > 0.5 and result.clean_correct.all()
    assert torch.equal(model(result.adversarial).argmax(1) == targets, result.success)
    already = make(model, 0.2, steps=5, targeted=True).run(images, labels)
    assert not already.clean_correct.any() and torch.equal(already.adversarial, images)
    with pytest.raises(ValueError, match="goes through targets of its own"):
        APGD(model, 0.1, targets=3, targeted=True)


def test_the_mean_of_several_gradients_beats_noise(model, data):
    """A model whose logits are right and whose gradients are mostly noise."""
    images, labels = data

    def noisy(x):
        noise = 0.7 * torch.randn(4, *x.shape, dtype=x.dtype)
        return model(x) + (noise * (x - x.detach())).flatten(2).sum(2).T

    torch.manual_seed(0)
    one, many = (
        PGD(noisy, 0.12, steps=8, eot=n, random_start=False, seed=1).run(images, labels)
        for n in (1, 12)
    )
    assert many.success.sum() > one.success.sum()
    held = many.robust
    assert (many.backwards[held] == 8 * 12).all() and (one.backwards[one.robust] == 8).all()
    with pytest.raises(ValueError, match="eot must be at least 1"):
        PGD(model, 0.1, eot=0)


def test_normalize_is_the_same_as_a_model_that_normalises(data):
    _, labels = data
    inner = toys.mlp(((data[0] - 0.4) / 0.2).float(), labels)

    def outer(x):
        return inner((x - 0.4) / 0.2)

    for make in (
        lambda m, **o: PGD(m, 0.04, steps=5, **o),
        lambda m, **o: Square(m, 0.04, steps=20, **o),
    ):
        given, built_in = make(inner, normalize=((0.4,), (0.2,))).run(*data), make(outer).run(*data)
        torch.testing.assert_close(given.adversarial, built_in.adversarial, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="normalize must be"):
        PGD(inner, normalize=((0.4,), (0.0,)))
    with pytest.raises(TypeError, match="normalize must be"):
        PGD(inner, normalize=0.5)


def test_logits_are_taken_out_of_outputs(model, data):
    plain = PGD(model, 0.05, steps=4)(*data)
    hugging = PGD(lambda x: SimpleNamespace(logits=model(x)), 0.05, steps=4)(*data)
    pair = PGD(
        lambda x: (torch.zeros(1), model(x)), 0.05, steps=4, logits_fn=lambda output: output[1]
    )(*data)
    assert torch.equal(plain, hugging) and torch.equal(plain, pair)
    with pytest.raises(TypeError, match=r"or logits_fn take it out of the output, got tuple"):
        PGD(lambda x: (model(x), 0), 0.05)(*data)


@pytest.mark.parametrize("random_start", [True, False])
def test_torchattacks_pgd(data, random_start):
    """Their loop, written out: the same seed, the same images, bit for bit."""
    images, labels = data[0].float(), data[1]
    model = toys.mlp(images, labels).float()
    # misclassified ones are attacked, too
    labels = torch.where(torch.arange(60) < 5, (labels + 1) % 4, labels)
    eps, alpha = 0.04, 0.01
    torch.manual_seed(3)
    ours = PGD.torchattacks(model, eps, alpha, 6, random_start).run(images, labels)
    torch.manual_seed(3)
    x = images.clone()
    if random_start:
        x = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(6):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), [x])
        x = (images + (x.detach() + alpha * grad.sign() - images).clamp(-eps, eps)).clamp(0, 1)
    torch.testing.assert_close(ours.adversarial, x, rtol=0, atol=1e-6)
    assert (ours.backwards == 6).all()


def test_success_never_falls_as_the_attack_grows(model, data):
    """Monotone in eps, steps and restarts; noise is no better than an attack; a radius of half the
    range breaks everything."""
    images, labels = data

    def share(**options):
        return PGD(model, **{"eps": 0.04, "steps": 10} | options).run(images, labels).success.sum()

    sweep = evaluate(
        model, data, {"pgd": PGD(model, steps=10)}, eps=[0.0, 0.01, 0.03, 0.1, 0.5], checks=False
    ).attacks["pgd"]
    counts = [p.count for p in sweep.curve.values()]
    assert counts == sorted(counts, reverse=True) and counts[0] == 60 and counts[-1] == 0
    assert share(steps=0) <= share() <= share(restarts=4)


def test_torchattacks_pgd_goes_on_with_the_users_generator(data):
    """Batch after batch, as torchattacks does; each begins where the last one left the
    generator."""
    images, labels = data[0].float(), data[1]
    model = toys.mlp(images, labels).float()
    attack = PGD.torchattacks(model, 0.04, 0.01, 0)
    torch.manual_seed(7)
    ours = [attack(x, y) for x, y in zip(images.split(20), labels.split(20), strict=True)]
    torch.manual_seed(7)
    theirs = [(x + torch.empty_like(x).uniform_(-0.04, 0.04)).clamp(0, 1) for x in images.split(20)]
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_unit_of_the_bounds_does_not_matter(model, data, norm):
    """Images from 0 to 255 instead of 0 to 1, and eps with them: the same points."""
    images, labels = data
    eps = {"Linf": 0.03, "L2": 0.3, "L1": 3.0}[norm]

    def wide(x):
        return model(x / 256)

    for options in ({}, {"targets": 2}, {"three_radii": True} if norm == "L1" else {"restarts": 2}):
        one = APGD(model, eps, 12, norm, **options).run(images, labels)
        other = APGD(wide, 256 * eps, 12, norm, bounds=(0.0, 256.0), **options).run(
            256 * images, labels
        )
        assert torch.equal(one.success, other.success)
        torch.testing.assert_close(256 * one.adversarial, other.adversarial, rtol=0, atol=1e-6)


def test_bounds_without_an_end_are_refused_where_they_do_not_work(model, data):
    images, labels = data
    bounds = (float("-inf"), float("inf"))
    for make in (
        lambda: PGD(model, 1.0, norm="L1", bounds=bounds),
        lambda: Square(model, 0.1, bounds=bounds),
    ):
        with pytest.raises(ValueError, match="bounds must be finite for"):
            make()
    assert PGD(model, 0.1, bounds=bounds).run(images, labels).success.any()
    with pytest.raises(TypeError, match=r"seed must be an int, or None, got 0\.5"):
        PGD(model, seed=0.5)


def test_a_loss_may_write_on_the_logits_it_is_given(model, data):
    def beside(logits, labels):
        return logits.scatter(1, labels.unsqueeze(1), -1e9).amax(1)

    def in_place(logits, labels):
        return logits.scatter_(1, labels.unsqueeze(1), -1e9).amax(1)

    for attack in (PGD, APGD):
        kept, written = (
            attack(model, 0.05, steps=5, loss=loss).run(*data) for loss in (beside, in_place)
        )
        assert torch.equal(written.adversarial, kept.adversarial)
        assert torch.equal(written.found, kept.found)
        assert torch.equal(written.forwards, kept.forwards)
