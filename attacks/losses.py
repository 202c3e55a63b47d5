"""The losses that attacks raise, and the table of their names.

A loss takes logits (B, C) and labels (B,) and gives (B,), one value an example. Its two targeted
forms rise with the logit of the target: one knows the targets (B,) alone, as an attack with
``targeted=True`` does, and the other the labels, too, as one that goes through targets of its own.

A class that is ruled out (``ruled_out.py``) counts as one that is not there.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ironmoe.attacks.ruled_out import too_far_below

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
AnyLoss = TypeVar("AnyLoss", Loss, TargetedLoss)

# DLR divides by a difference of logits plus this number, so that equal logits give no 0 / 0.
LEAST_DIFFERENCE = 1e-12
# DLR compares so many of the highest logits with each other.
DLR_CLASSES = 3
TARGETED_DLR_CLASSES = 4
# What errors advise where a model has a single output for two classes.
ONE_LOGIT = "; make two of one logit z: torch.cat([-z, z], 1)"


def check_several_classes(logits: Tensor, name: str) -> None:
    """ValueError: outputs that are no logits (B, C) of two classes or more; ``name``: who needs
    them."""
    if logits.ndim < 2:
        raise ValueError(
            f"{name} needs logits (B, C), got labels alone ({logits.dtype}); HopSkipJump can do "
            "with labels"
        )
    if logits.shape[1] < 2:
        raise ValueError(f"{name} needs at least 2 classes, got logits of 1{ONE_LOGIT}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label]."""
    check_several_classes(logits, "ce")
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one (Carlini & Wagner, arXiv 1608.04644). It is above 0
    exactly where an example is misclassified."""
    check_several_classes(logits, "margin")
    right = logits.gather(1, labels.unsqueeze(1))
    wrong = logits.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1)
    return wrong - right.squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, arXiv 2003.01690, sec. 4): the margin over z₁ − z₃,
    z₁ ≥ z₂ ≥ … the sorted logits.

    Multiplying the logits by a number, or adding one, does not change it. So its gradient does not
    vanish where a model is very sure, as that of the cross-entropy does. Where the model rules out
    the third class, there is no such scale, and the loss of the example is its margin.

    Raises:
        ValueError: fewer than 3 classes.
    """
    _check_classes(logits, DLR_CLASSES, "dlr", "margin")
    return margin(logits, labels) / _dlr_scale(logits)


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the binary cross-entropies of all classes: for models that are trained to tell
    each class by itself."""
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    # −∞ times the 0 of another class would be NaN.
    finite = logits.clamp_min(torch.finfo(logits.dtype).min)
    return torch.nn.functional.binary_cross_entropy_with_logits(
        finite, one_hot, reduction="none"
    ).sum(1)


def reaching_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]."""
    return -cross_entropy(logits, targets)


def reaching_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the best other one. It is above 0 exactly where the target is
    reached."""
    return -margin(logits, targets)


def reaching_dlr(logits: Tensor, targets: Tensor) -> Tensor:
    """The targeted DLR (arXiv 2003.01690, sec. 4) where the label is not known: the target's logit
    minus the best other one, over z₁ − (z₃ + z₄) / 2, z₁ ≥ z₂ ≥ … the sorted logits.

    The paper subtracts the logit of the label, which is the best other one at first. With that of
    the best other class the loss is above 0 exactly where the target is reached. Where the model
    has no fourth class, or rules it out, the loss of the example is the numerator.

    For gradients the scale is a constant. A target far below z₄ would otherwise be reached by none
    of the attacks that make few steps: raising z₁, the class to leave, makes the scale longer and
    so the loss higher.

    Raises:
        ValueError: fewer than 3 classes.
    """
    _check_classes(logits, DLR_CLASSES, "dlr", "margin")
    return reaching_margin(logits, targets) / _targeted_dlr_scale(logits.detach())


def reaching_sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the sum of the binary cross-entropies of all classes, the target alone being right."""
    return -sigmoid_cross_entropy(logits, targets)


def targeted_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]; the label has no part in it."""
    return reaching_cross_entropy(logits, targets)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the right one. Above 0 the example is misclassified."""
    target = logits.gather(1, targets.unsqueeze(1))
    right = logits.gather(1, labels.unsqueeze(1))
    return (target - right).squeeze(1)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR (arXiv 2003.01690, sec. 4): the targeted margin over z₁ − (z₃ + z₄) / 2, z₁ ≥ z₂
    ≥ … the sorted logits. Where the model rules out the fourth class, the loss of the example is
    its targeted margin.

    Raises:
        ValueError: fewer than 4 classes.
    """
    _check_classes(logits, TARGETED_DLR_CLASSES, "targeted_dlr", "targeted_margin")
    return targeted_margin(logits, labels, targets) / _targeted_dlr_scale(logits)


def _dlr_scale(logits: Tensor) -> Tensor:
    """(B,) z₁ − z₃; 1 where the third class is ruled out."""
    top = logits.topk(DLR_CLASSES, dim=1).values
    scale = top[:, 0] - top[:, 2] + LEAST_DIFFERENCE
    return torch.where(too_far_below(top[:, 2], top[:, 0]), 1, scale)


def _targeted_dlr_scale(logits: Tensor) -> Tensor:
    """(B,) z₁ − (z₃ + z₄) / 2; 1 where there is no fourth class, or it is ruled out."""
    if logits.shape[1] < TARGETED_DLR_CLASSES:
        return torch.ones_like(logits[:, 0])
    top = logits.topk(TARGETED_DLR_CLASSES, dim=1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + LEAST_DIFFERENCE
    return torch.where(too_far_below(top[:, 3], top[:, 0]), 1, scale)


class NamedLoss(NamedTuple):
    """A loss under its name, in its three forms. Attacks raise each of them.

    plain:    of (logits, labels), to leave the labels
    targeted: of (logits, labels, targets), to leave the labels for the targets; None: it has no
        such form
    plain_classes, targeted_classes: the fewest classes that ``plain``, and the two others, make
        sense for
    reach:    of (logits, targets), to reach the targets, whatever the labels are; None: minus
        ``plain``
    """

    plain: Loss
    targeted: TargetedLoss | None
    plain_classes: int = 2
    targeted_classes: int = 2
    reach: Loss | None = None


LOSSES: dict[str, NamedLoss] = {
    "ce": NamedLoss(cross_entropy, targeted_cross_entropy, reach=reaching_cross_entropy),
    "margin": NamedLoss(margin, targeted_margin, reach=reaching_margin),
    "dlr": NamedLoss(dlr, targeted_dlr, DLR_CLASSES, TARGETED_DLR_CLASSES, reaching_dlr),
    "sigmoid": NamedLoss(sigmoid_cross_entropy, None, reach=reaching_sigmoid_cross_entropy),
}
"""Every loss that an attack takes by name."""


def get_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself.

    Raises:
        ValueError: there is no loss of this name.
    """
    return _named(loss, {name: entry.plain for name, entry in LOSSES.items()})


def get_targeted_loss(loss: str | TargetedLoss) -> TargetedLoss:
    """The form of a loss that takes (logits, labels, targets) by name, or the callable itself.

    Raises:
        ValueError: there is no loss of this name, or it has no such form.
    """
    return _named(loss, {name: entry.targeted for name, entry in LOSSES.items() if entry.targeted})


def least_classes(loss: Loss | TargetedLoss) -> int:
    """The fewest classes that a loss makes sense for; 2 for one that is not in the table."""
    for entry in LOSSES.values():
        if loss is entry.plain:
            return entry.plain_classes
        if loss in (entry.reach, entry.targeted):
            return entry.targeted_classes
    return 2


def _named(loss: str | AnyLoss, losses: Mapping[str, AnyLoss]) -> AnyLoss:
    if callable(loss):
        return loss
    if loss not in losses:
        raise ValueError(f"loss must be one of {tuple(losses)} or a callable, got {loss!r}")
    return losses[loss]


def _check_classes(logits: Tensor, least: int, name: str, alternative: str) -> None:
    check_several_classes(logits, name)
    if logits.shape[1] < least:
        raise ValueError(
            f"{name} needs at least {least} classes, got logits of {logits.shape[1]}; use "
            f"{alternative!r}"
        )
