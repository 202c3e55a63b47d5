"""Every named loss under ``targeted=True`` and with targets, where the optimum is known."""

import pytest
import torch
import toys
from pairwise import pairwise
from torch import nn

from ironmoe.attacks import APGD, FGSM, MIFGSM, PGD, Square
from ironmoe.attacks.losses import LOSSES

EPS = 0.1
ATTACKS = {
    "pgd": lambda model, **options: PGD(model, EPS, steps=40, **options),
    "apgd": lambda model, **options: APGD(model, EPS, steps=40, **options),
    "mifgsm": lambda model, **options: MIFGSM(model, EPS, steps=40, **options),
}


@pytest.fixture(scope="module")
def scores():
    """Images (N, 6) that are their own logits, far from the faces of the box."""
    return 0.3 + 0.4 * torch.rand(100, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def two_in_front(scores):
    """The same with four classes that no point of the ball brings into play."""
    return scores.sort(descending=True).values - torch.tensor([0.0, 0, 0.3, 0.3, 0.3, 0.3])


@pytest.mark.parametrize("name, loss, rank", pairwise(list(ATTACKS), list(LOSSES), [1, 2, 3]))
def test_the_target_is_reached_exactly_where_it_can_be(scores, name, loss, rank):
    """The target's logit rises by eps and every other one falls by eps, at most."""
    targets = scores.topk(6).indices[:, rank]
    attack = ATTACKS[name](nn.Identity(), loss=loss, targeted=True)
    result = attack.run(scores, targets)
    gap = scores.amax(1) - scores.gather(1, targets[:, None])[:, 0]
    clear = (gap - 2 * EPS).abs() > 0.01
    assert ((gap < 2 * EPS)[clear] == result.success[clear]).all()
    assert 10 < int(result.success.sum()) < 100


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ATTACKS)
def test_the_label_is_left_exactly_where_it_can_be(two_in_front, name, loss):
    """It falls by eps, and the best other one rises by eps, at most."""
    attack = ATTACKS[name](nn.Identity(), loss=loss, bounds=(-1, 1))
    result = attack.run(two_in_front, two_in_front.argmax(1))
    first, second = two_in_front.topk(2).values.T
    clear = (first - second - 2 * EPS).abs() > 0.01
    assert ((first - second < 2 * EPS)[clear] == result.success[clear]).all()


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if entry.targeted])
def test_the_label_is_left_for_some_target_exactly_where_it_can_be(scores, loss):
    attack = APGD(nn.Identity(), EPS, steps=40, loss=loss, targets=5)
    result = attack.run(scores, scores.argmax(1))
    first, second = scores.topk(2).values.T
    clear = (first - second - 2 * EPS).abs() > 0.01
    assert ((first - second < 2 * EPS)[clear] == result.success[clear]).all()


@pytest.mark.parametrize("loss", ["ce", "margin", "sigmoid"])
@pytest.mark.parametrize("norm, dual_order", [("Linf", 1), ("L2", 2)])
def test_two_classes_end_at_the_optimum_of_the_linear_model(loss, norm, dual_order):
    """z = (0, ⟨w, x⟩): towards class 1 the margin rises by eps times the dual norm of w."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, generator=generator)
    images = 0.5 + 0.02 * torch.randn(30, 20, generator=generator)
    images = images - weight * ((images @ weight) + 1)[:, None] / weight.norm() ** 2  # z = −1

    def model(x):
        rise = x @ weight
        return torch.stack([torch.zeros_like(rise), rise], 1)

    dual = float(weight.norm(dual_order))
    options = {"norm": norm, "loss": loss, "targeted": True, "bounds": (-9, 9)}
    for eps, reached in ((0.99 / dual, 0), (1.01 / dual, 30)):
        attacks = [
            PGD(model, eps, steps=40, **options),
            FGSM(model, eps, **options),
            APGD(model, eps, steps=40, **options),
        ]
        for attack in attacks:
            result = attack.run(images, torch.ones(30, dtype=torch.int64))
            assert int(result.success.sum()) == reached


@pytest.mark.parametrize(
    "attack, eps, seed", [(PGD, 0.1, 0), (APGD, 0.1, 1), (MIFGSM, 0.1, 2), (FGSM, 0.12, 3)]
)
def test_the_targeted_dlr_reaches_what_the_cross_entropy_reaches(attack, eps, seed):
    images, labels = toys.blobs(100, classes=6, noise=0.2, seed=seed)
    model = toys.mlp(images, labels, seed).float()
    targets = (labels + 1 + torch.arange(100) % 5) % 6  # near ones and far ones
    steps = {} if attack is FGSM else {"steps": 20}
    reached = []
    for loss in ("ce", "dlr", "margin"):
        result = attack(model, eps, loss=loss, targeted=True, **steps).run(images, targets)
        reached.append(int(result.success.sum()))
    assert 50 < reached[0] < 100 and min(reached[1:]) >= reached[0] - 4


def test_a_callable_is_lowered(scores):
    targets = scores.topk(6).indices[:, 1]
    named, called = (
        PGD(nn.Identity(), EPS, steps=20, loss=loss, targeted=True).run(scores, targets)
        for loss in ("ce", lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"))
    )
    assert torch.equal(named.adversarial, called.adversarial)


@pytest.mark.parametrize("loss", ["dlr", "margin", "ce"])
def test_square_and_three_classes(scores, loss):
    """With three classes the targeted DLR is the margin, and no error."""
    three = scores[:, :3]
    targets = three.argmin(1)
    reached = (
        PGD(nn.Identity(), EPS, steps=40, loss=loss, targeted=True).run(three, targets).success
    )
    gap = three.amax(1) - three.amin(1)
    clear = (gap - 2 * EPS).abs() > 0.01
    assert torch.equal(reached[clear], (gap < 2 * EPS)[clear])
    square = Square(nn.Identity(), EPS, steps=120, targeted=True).run(three, targets).success
    assert not (square & ~reached)[clear].any() and square.sum() > 0.5 * reached.sum()
