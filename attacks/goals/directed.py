"""What goals share that go two ways: outputs leave the labels or, with ``targeted``, come to
them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.goal import Goal, Loss, described
from ironmoe.attacks.goals.labels import LabelGoal


@dataclass(frozen=True)
class DirectedGoal(Goal):
    """Outputs have left the labels, or they have not and so are a success with ``targeted``.

    Every loss of ``losses`` has a form of its own for each way. A callable says how far outputs are
    from the labels; with ``targeted`` it is lowered.
    """

    @property
    def usual_loss(self) -> str | None:
        return "margin"

    @abstractmethod
    def left(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,) bool: these outputs have left the labels."""

    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        left = self.left(outputs, labels)
        return ~left if self.targeted else left

    def loss_named(self, loss: str | Loss | None) -> Loss:
        if not callable(loss):
            return super().loss_named(loss)
        return lambda outputs, labels: self._directed(loss(outputs, labels))

    def chosen_loss(self, loss: str | Loss | None) -> Loss:
        return loss if callable(loss) else self.loss_named(loss)

    def _directed(self, away: Tensor) -> Tensor:
        """What rises as the goal comes nearer, of what rises as outputs leave the labels."""
        return -away if self.targeted else away


@dataclass(frozen=True)
class ClassGoal(DirectedGoal, LabelGoal):
    """Logits (B, C) and labels (N,) int64, 0 … C − 1. Attacks that need verdicts alone need the
    logits, too."""

    usual_loss = "margin"

    def checked_outputs(self, outputs: Any, count: int) -> Tensor:
        is_float = isinstance(outputs, Tensor) and outputs.is_floating_point()
        if not is_float or outputs.ndim != 2 or len(outputs) != count:
            raise TypeError(
                f"model must return a float tensor of logits ({count}, C) for {self}, or logits_fn "
                f"take it out of the output, got {described(outputs)}"
            )
        return outputs


def margin_of_many(gains: Tensor, counts: Tensor, needed: Tensor) -> Tensor:
    """(R,) how far a goal is reached for which several things must have a gain above 0 at a time.

    It is above 0 if so many of them have, and then the least gain of the best ``needed``. Below 0
    it is the mean of what the best ``needed`` lack, so that its gradient moves all of those.

    Args:
        gains: (R, M).
        counts: (R, M) bool, the things that count.
        needed: (R,) int64, how many of them must have a gain above 0, at least 1.
    """
    ranked = gains.masked_fill(~counts, float("-inf")).sort(1, descending=True).values
    last = ranked.gather(1, (needed - 1).unsqueeze(1)).squeeze(1)

    places = torch.arange(gains.shape[1], device=gains.device)
    best = places < needed.unsqueeze(1)
    lacking = torch.where(best, ranked, 0).clamp_max(0).sum(1) / needed
    return torch.where(last > 0, last, lacking)
