"""Losses on logits, against their definitions spelled out one example at a time."""

import documented
import pytest
import torch

from ironmoe.attacks import PGD
from ironmoe.attacks.losses import (
    LOSSES,
    dlr,
    get_loss,
    get_targeted_loss,
    targeted_dlr,
    targeted_margin,
)

TARGETED = {name: entry.targeted for name, entry in LOSSES.items() if entry.targeted}


def plain_dlr(logits, label):
    ranked = sorted(logits.tolist(), reverse=True)
    best_wrong = max(value for i, value in enumerate(logits.tolist()) if i != label)
    return -(logits[label].item() - best_wrong) / (ranked[0] - ranked[2])


def plain_targeted_dlr(logits, label, target):
    ranked = sorted(logits.tolist(), reverse=True)
    return -(logits[label].item() - logits[target].item()) / (
        ranked[0] - (ranked[2] + ranked[3]) / 2
    )


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(30, 7, dtype=torch.float64)


def test_dlr_is_its_definition(logits):
    # the top class, and one far from it
    labels = torch.cat([logits[:10].argmax(1), logits[10:].topk(5).indices[:, 4]])
    expected = torch.tensor(
        [plain_dlr(z, y) for z, y in zip(logits, labels.tolist(), strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(dlr(logits, labels), expected)
    assert (dlr(logits, labels)[:10] < 0).all() and (dlr(logits, labels)[10:] > 0).all()
    three = logits[:, :3]
    expected = torch.tensor([plain_dlr(z, 1) for z in three], dtype=torch.float64)
    torch.testing.assert_close(dlr(three, torch.ones(30, dtype=torch.int64)), expected)


def test_targeted_dlr_is_its_definition(logits):
    for label, target in ((0, 1), (5, 2), (3, 6)):
        labels, targets = torch.full((30,), label), torch.full((30,), target)
        expected = torch.tensor(
            [plain_targeted_dlr(z, label, target) for z in logits], dtype=torch.float64
        )
        torch.testing.assert_close(targeted_dlr(logits, labels, targets), expected)
        torch.testing.assert_close(
            targeted_margin(logits, labels, targets), logits[:, target] - logits[:, label]
        )


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_gradients_are_those_of_finite_differences(logits, rank):
    labels = logits.topk(5).indices[:, rank]
    targets = logits.topk(5).indices[:, (rank + 2) % 5]
    inputs = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dlr(z, labels), inputs)
    assert torch.autograd.gradcheck(lambda z: targeted_dlr(z, labels, targets), inputs)


def test_dlr_does_not_feel_the_scale_of_the_logits(logits):
    labels = logits.argmax(1)
    # the cross-entropy's gradient is 0 here
    scaled = logits.float().mul(1e4).add(3).requires_grad_()
    torch.testing.assert_close(
        dlr(scaled, labels).double(), dlr(logits, labels), rtol=1e-4, atol=1e-4
    )
    (grad,) = torch.autograd.grad(dlr(scaled, labels).sum(), scaled)
    (saturated,) = torch.autograd.grad(get_loss("ce")(scaled, labels).sum(), scaled)
    assert (grad.abs().amax(1) > 1e-6).all() and (saturated.abs().amax(1) == 0).sum() > 20


def test_ties_give_finite_values_and_gradients():
    logits = torch.tensor(
        [[1.0, 1, 1, 1], [2, 2, 1, 0], [2, 1, 1, 1], [3, 3, 3, 0]], requires_grad=True
    )
    labels, targets = torch.tensor([0, 0, 0, 3]), torch.tensor([1, 1, 1, 1])
    for loss in (dlr(logits, labels), targeted_dlr(logits, labels, targets)):
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and grad.isfinite().all()
    assert dlr(logits, labels)[:3].tolist() == [0, 0, -1]
    assert targeted_dlr(logits, labels, targets)[1].item() == 0


def test_too_few_classes_name_the_alternative():
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"dlr needs at least 3 classes, got logits of 2; use 'margin'"
    ):
        dlr(torch.zeros(2, 2), labels)
    with pytest.raises(
        ValueError,
        match=r"targeted_dlr needs at least 4 classes, got logits of 3; use 'targeted_margin'",
    ):
        targeted_dlr(torch.zeros(2, 3), labels, labels)
    with pytest.raises(ValueError, match="use 'margin'"):
        PGD(lambda x: x.flatten(1), 0.1, loss="dlr")(torch.tensor([[0.9, 0.1], [0.2, 0.1]]), labels)


def test_losses_by_name():
    plain = {name: entry.plain for name, entry in LOSSES.items()}
    for losses, get in ((plain, get_loss), (TARGETED, get_targeted_loss)):
        assert {"ce", "margin", "dlr"} <= set(losses)
        assert all(get(name) is loss for name, loss in losses.items())
        assert get(abs) is abs
        with pytest.raises(ValueError, match=r"loss must be one of .* or a callable, got 'dl'"):
            get("dl")


def test_targeted_losses_rise_with_the_target_and_fall_with_the_label(logits):
    labels, targets = torch.full((30,), 2), torch.full((30,), 4)
    up = logits.clone()
    up[:, 4] += 1e-3
    for name, loss in TARGETED.items():
        inputs = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(inputs, labels, targets).sum(), inputs)
        undisturbed = (logits[:, 4] < logits.topk(4).values[:, 3]) & (
            logits[:, 2] < logits.topk(4).values[:, 3]
        )
        rising = undisturbed if name == "dlr" else torch.ones_like(undisturbed)
        assert rising.any() and (grad[rising, 4] > 0).all()
        assert (loss(up, labels, targets) > loss(logits, labels, targets))[rising].all()


def test_the_page_on_attacks_names_every_loss():
    page = (documented.ROOT / "docs" / "attacks.md").read_text()
    assert [name for name in LOSSES if f'`"{name}"`' not in page] == []
