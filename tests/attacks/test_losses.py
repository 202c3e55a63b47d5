"""Losses on logits, against their definitions spelled out one example at a time."""

import math

import documented
import pytest
import torch

from ironmoe.attacks import PGD
from ironmoe.attacks.losses import (
    LOSSES,
    dlr,
    get_loss,
    get_targeted_loss,
    margin,
    reaching_dlr,
    reaching_margin,
    targeted_dlr,
    targeted_margin,
)
from ironmoe.attacks.ruled_out import ruled_out

REACHING = {name: entry.reach for name, entry in LOSSES.items()}
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


def plain_reaching(name, logits, target):
    """Of one example, in plain numbers."""
    values = logits.tolist()
    ranked = sorted(values, reverse=True)
    best_other = max(value for i, value in enumerate(values) if i != target)
    if name == "ce":
        return values[target] - math.log(sum(map(math.exp, values)))
    if name == "sigmoid":
        signs = [-1 if i == target else 1 for i in range(len(values))]
        return -sum(math.log1p(math.exp(s * v)) for s, v in zip(signs, values, strict=True))
    scale = ranked[0] - (ranked[2] + ranked[3]) / 2 if name == "dlr" else 1
    return (values[target] - best_other) / scale


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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_a_loss_that_makes_for_a_target_is_its_definition(logits, name, rank):
    targets = logits.topk(7).indices[:, rank]
    expected = [plain_reaching(name, z, t) for z, t in zip(logits, targets.tolist(), strict=True)]
    torch.testing.assert_close(
        REACHING[name](logits, targets), torch.tensor(expected, dtype=torch.float64)
    )
    inputs = logits.clone().requires_grad_()
    if name != "dlr":
        assert torch.autograd.gradcheck(lambda z: REACHING[name](z, targets), inputs)
        return

    # its scale is a constant for the gradient
    (grad,) = torch.autograd.grad(REACHING[name](inputs, targets).sum(), inputs)
    (direction,) = torch.autograd.grad(reaching_margin(inputs, targets).sum(), inputs)
    scale = reaching_margin(logits, targets) / REACHING[name](logits, targets)
    torch.testing.assert_close(grad * scale[:, None], direction)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_gives_the_gradients_of_float64(logits, name):
    labels, targets = logits.topk(5).indices[:, [0, 3]].T
    forms = [lambda z: LOSSES[name].plain(z, labels), lambda z: REACHING[name](z, targets)]
    if name in TARGETED:
        forms.append(lambda z: TARGETED[name](z, labels, targets))
    for form in forms:
        wide, narrow = (logits.to(d).requires_grad_() for d in (torch.float64, torch.float32))
        (exact,) = torch.autograd.grad(form(wide).sum(), wide)
        (grad,) = torch.autograd.grad(form(narrow).sum(), narrow)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_a_loss_that_makes_for_a_target_is_above_0_where_it_is_reached(logits, name):
    targets = torch.arange(30) % 7
    assert ((REACHING[name](logits, targets) > 0) == (logits.argmax(1) == targets)).all()


RULED_OUT = [-math.inf, torch.finfo(torch.float32).min, -1e30, -1e9, torch.finfo(torch.float16).min]


@pytest.mark.parametrize("mask", RULED_OUT)
@pytest.mark.parametrize("left", [2, 3, 4, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_ruled_out_classes_count_as_ones_that_are_not_there(logits, name, left, mask):
    """The values and the gradients are those of the logits cut off; with too few classes left for
    DLR those of the margin."""
    labels = torch.arange(30) % left
    targets = (labels + 1) % left
    fallback = {"plain": 3, "reach": 4, "targeted": 4}
    for form, least in fallback.items():
        loss = getattr(LOSSES[name], form)
        if loss is None:
            continue
        chosen = (labels, targets) if form == "targeted" else (labels,)
        results = []
        for cut in (False, True):
            inputs = logits.float().requires_grad_()
            seen = inputs[:, :left] if cut else inputs.masked_fill(torch.arange(7) >= left, mask)
            too_few = cut and name == "dlr" and left < least
            values = (getattr(LOSSES["margin"], form) if too_few else loss)(seen, *chosen)
            (grad,) = torch.autograd.grad(values.sum(), inputs)
            results.append((values.detach(), grad))
        torch.testing.assert_close(results[0], results[1])


def test_each_row_has_classes_of_its_own():
    """In one row a class is ruled out, in the next one not."""
    logits = torch.tensor([[3.0, 1, -1e9, -1e9, -1e9], [3, 1, 0, -1, -2], [3, 1, 0, -1, -1e9]])
    labels = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(dlr(logits, labels), torch.tensor([-2, -2 / 3, -2 / 3]))
    expected = torch.tensor([-2, -2 / 3.5, -2 / 3.5])
    torch.testing.assert_close(reaching_dlr(logits, labels + 1), expected)
    torch.testing.assert_close(targeted_dlr(logits, labels, labels + 1), expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e8, 1e20])
def test_large_logits_rule_nothing_out(logits, scale):
    """They keep their DLR, which does not feel the scale."""
    assert not ruled_out(scale * logits).any()
    assert not ruled_out((scale * logits).log_softmax(1)).any() or scale > 1e4
    threshold = torch.tensor([[0.5, 0.5 - 1.01 * 2**20], [8.0, -0.99 * 8 * 2**20]])
    assert ruled_out(threshold).tolist() == [[False, True], [False, False]]


def test_one_possible_class_gives_no_nan():
    logits = torch.full((2, 5), -math.inf).index_fill(1, torch.tensor([0]), 2).requires_grad_()
    labels = torch.zeros(2, dtype=torch.int64)
    for loss in (margin, reaching_margin, dlr, reaching_dlr):
        for classes in (labels, labels + 1):
            value = loss(logits, classes)
            (grad,) = torch.autograd.grad(value.sum(), logits)
            assert not value.isnan().any() and grad.isfinite().all()


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
