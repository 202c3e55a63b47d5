"""The goals of a classifier with one label an example: to leave the label, or to reach it."""

from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.goal import Goal, Loss, described
from ironmoe.attacks.losses import LOSSES, ONE_LOGIT, get_loss
from ironmoe.attacks.model_errors import LABELS_WILL_DO


class LabelGoal(Goal):
    """Logits (B, C) and labels (N,) int64, 0 … C − 1.

    A model that gives nothing but labels, integers (B,), serves attacks that need verdicts alone.
    """

    has_classes = True
    usual_loss = "ce"

    def chosen_loss(self, loss: str | Loss | None) -> Loss:
        return get_loss(self.usual_loss if loss is None else loss)

    def prediction(self, outputs: Tensor) -> Tensor:
        return outputs.long() if outputs.ndim == 1 else outputs.argmax(1)

    def check_labels(self, labels: Any, count: int) -> None:
        is_tensor = isinstance(labels, Tensor)
        if not is_tensor or labels.dtype != torch.int64 or labels.shape != (count,):
            raise TypeError(
                f"labels must be an int64 tensor ({count},), got {described(labels)}"
                + label_advice(labels, count)
                + (OTHER_LABELS if is_tensor and may_be_others(labels, count) else "")
            )
        if count and int(labels.min()) < 0:
            raise ValueError(f"labels must be at least 0, got {int(labels.min())}")

    def checked_outputs(self, outputs: Any, count: int) -> Tensor:
        if isinstance(outputs, Tensor) and len(outputs.shape) and len(outputs) == count:
            if outputs.ndim == 2 and outputs.is_floating_point():
                return outputs
            if outputs.ndim == 1 and outputs.dtype in INTEGERS:
                return outputs
        one_each = isinstance(outputs, Tensor) and outputs.shape == (count,)
        advice = ONE_LOGIT.replace("cat", "stack") if one_each else ""
        is_array = not isinstance(outputs, Tensor) and hasattr(outputs, "__array__")
        if isinstance(outputs, list) or is_array:
            advice = NO_TENSOR
        raise TypeError(
            f"model must return a float tensor of logits ({count}, C), or logits_fn take it out of "
            f"the output, got "
            f"{_kind(outputs)}{advice}"
        )

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """ValueError: labels beyond the classes of the logits."""
        if outputs.ndim == 2 and len(labels) and int(labels.max()) >= outputs.shape[1]:
            raise ValueError(
                f"labels must be below the model's {outputs.shape[1]} classes, got "
                f"{int(labels.max())}{ONE_LOGIT if outputs.shape[1] == 1 else ''}"
            )

    def bad(self, outputs: Tensor) -> Tensor:
        """NaN; +∞; −∞ for every class. A class of −∞ beside finite ones is ruled out, no more."""
        if outputs.ndim == 1:
            return torch.zeros_like(outputs, dtype=torch.bool)
        highest = outputs.amax(1)  # NaN where there is one
        return ~highest.isfinite()


class Untargeted(LabelGoal):
    """The model names another class than the label."""

    @property
    def losses(self) -> dict[str, Loss]:
        """Those of ``ironmoe.attacks.losses``."""
        return {name: entry.plain for name, entry in LOSSES.items()}

    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.prediction(outputs) != labels


class Targeted(LabelGoal):
    """The model names the label, which is the class to reach. Images that are classified so
    already are not attacked."""

    targeted = True

    @property
    def losses(self) -> dict[str, Loss]:
        """Those of ``ironmoe.attacks.losses``, in the form for a target."""
        return {name: entry.reach or _lowered(entry.plain) for name, entry in LOSSES.items()}

    def loss_named(self, loss: str | Loss | None) -> Loss:
        """A callable, which says how far the logits are from the label, is lowered."""
        return _lowered(loss) if callable(loss) else super().loss_named(loss)

    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.prediction(outputs) == labels


def chosen_goal(goal: Goal | None, targeted: bool, attack: str, why_classes: str | None) -> Goal:
    """The goal of an attack.

    Args:
        goal: what the user gave; None: a label, to be left or (``targeted``) to be reached.
        attack: its name, for errors.
        why_classes: why it takes goals of classifiers alone; None: it takes any.

    Raises:
        TypeError: ``goal`` is none.
        ValueError: it does not go with ``targeted`` or with the attack.
    """
    if goal is None:
        return Targeted() if targeted else Untargeted()
    if not isinstance(goal, Goal):
        got = goal.__name__ if isinstance(goal, type) else type(goal).__name__
        raise TypeError(f"goal must be None or a goal, such as Untargeted(), got {got}")
    if targeted and not isinstance(goal, Targeted):
        raise ValueError(
            "targeted=True must go with goal=Targeted() or none, since a goal says itself which "
            f"way it goes, got {goal}"
        )
    if why_classes and not isinstance(goal, PLAIN):
        raise ValueError(
            f"goal must be Untargeted() or Targeted() for {attack}, which {why_classes}, got {goal}"
        )
    return goal


def label_advice(labels: Any, count: int) -> str:
    """How labels of another form become ``count`` classes, as an error ends; nothing where they
    cannot. It asks for no values, so the host does not wait."""
    if not isinstance(labels, Tensor):
        is_array = isinstance(labels, list | tuple) or hasattr(labels, "__array__")
        return "; use torch.as_tensor(labels)" if is_array else ""
    if not labels.ndim:
        return "; one image needs an axis in front, too: images[None], labels[None]"
    if len(labels) != count or labels.ndim > 2:
        return ""
    if labels.ndim == 2 and labels.shape[1] > 1:
        return "; of one-hot labels or scores use labels.argmax(1)"
    column = ".squeeze(1)" if labels.ndim == 2 else ""
    cast = "" if labels.dtype == torch.int64 else ".long()"
    return f"; use labels{column}{cast} where these are classes"


def may_be_others(labels: Tensor, count: int) -> bool:
    """Whether labels that are no classes (count,) may belong to another goal than one class an
    example; integers with one number an example do not."""
    one_each = labels.ndim == 1 or labels.shape[1:] == (1,)
    integers = labels.dtype == torch.bool or labels.dtype in INTEGERS
    return bool(labels.ndim) and len(labels) == count and not (one_each and integers)


def needs_logits(attack: str) -> TypeError:
    """The error of an attack (its name) that cannot do with labels alone."""
    return TypeError(
        f"model must return a float tensor of logits for {attack}, got labels alone; "
        f"{LABELS_WILL_DO}"
    )


PLAIN = (Untargeted, Targeted)
"""The goals that need no more words than ``targeted``."""

OTHER_LABELS = (
    "; for labels that are not one class an example give a goal=, such as MultiLabel(), "
    "Segmentation(…), Regression(…) or EmbeddingDistance(…)"
)

NO_TENSOR = "; return a tensor: floats are logits, integers (B,) are labels, for HopSkipJump"

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _lowered(loss: Loss) -> Loss:
    """The loss whose rise is the other one's fall."""
    return lambda outputs, labels: -loss(outputs, labels)


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else described(value)
