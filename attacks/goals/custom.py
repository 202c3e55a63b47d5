"""A goal of a user's own functions: detection, or anything else."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.goals.goal import Goal, Loss, described

Verdict = Callable[[Tensor, Tensor], Tensor]


class Custom(Goal):
    """``reached`` says what a success is, and ``loss`` what the search raises.

    Outputs are one float tensor (N, …), finite everywhere; labels are a tensor (N, …) of any shape
    and dtype. Each function is given the outputs and labels of R examples, (R, …), which are some
    of the N in any order and may come again and again; it must say the same of an example whatever
    others are beside it. It is given copies, so it may write on them.

    Args:
        reached: (outputs, labels) → (R,) bool.
        loss: (outputs, labels) → (R,), differentiable; or name → such a function, of which the
            first is the usual one. One named "margin" must be above 0 where the goal is reached and
            below 0 where it is not: CW needs it, and Square prefers it. None: attacks that need no
            loss take the goal.
        figure: (outputs, labels) → (R,), a number for reports. None: there is none.
        prediction: outputs → (R,) int64, the class that the model names, for reports. None: −1.
        check: (outputs, labels) → None; it is given clean outputs and their labels, batch by batch,
            and raises an error if they do not go together.
        name: what reports and errors call the goal. None: the name of ``reached``.

    Raises:
        TypeError: a function that is none. In a run: one that returns anything else than the above.
    """

    def __init__(
        self,
        reached: Verdict,
        *,
        loss: Loss | Mapping[str, Loss] | None = None,
        figure: Loss | None = None,
        prediction: Callable[[Tensor], Tensor] | None = None,
        check: Callable[[Tensor, Tensor], None] | None = None,
        name: str | None = None,
    ) -> None:
        self.is_reached = reached
        self.own_losses = (
            dict(loss) if isinstance(loss, Mapping) else {"loss": loss} if loss else {}
        )
        self.figure_of = figure
        self.class_of = prediction
        self.agree = check
        self.name = name

        optional = {"figure": figure, "prediction": prediction, "check": check}
        needed = {"reached": reached, **self.own_losses}
        for what, function in {**optional, **needed}.items():
            if not callable(function) and (function is not None or what in needed):
                raise TypeError(f"{what} must be a function, got {function!r}")

    def __repr__(self) -> str:
        known = getattr(self.is_reached, "__name__", type(self.is_reached).__name__)
        return f"Custom({self.name or known})"

    @property
    def losses(self) -> dict[str, Loss]:
        return {name: _Checked(name, loss) for name, loss in self.own_losses.items()}

    @property
    def usual_loss(self) -> str | None:
        return next(iter(self.own_losses), None)

    def chosen_loss(self, loss: str | Loss | None) -> Loss:
        self.loss_named(loss)  # raises an error where there is none
        return loss if callable(loss) else self.own_losses[loss or next(iter(self.own_losses))]

    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        verdict = self.is_reached(outputs.clone(), labels.clone())
        if not _is_one_each(verdict, len(outputs)) or verdict.dtype != torch.bool:
            raise TypeError(
                f"reached must return a bool tensor ({len(outputs)},), got {described(verdict)}"
            )
        return verdict

    def prediction(self, outputs: Tensor) -> Tensor:
        if self.class_of is None:
            return super().prediction(outputs)
        predicted = self.class_of(outputs.clone())
        if not _is_one_each(predicted, len(outputs)) or predicted.dtype != torch.int64:
            raise TypeError(
                f"prediction must return an int64 tensor ({len(outputs)},), got "
                f"{described(predicted)}"
            )
        return predicted

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        if self.figure_of is None:
            return None
        return _Checked("figure", self.figure_of)(outputs, labels).detach()

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Whatever ``check`` raises."""
        if self.agree is not None:
            self.agree(outputs.clone(), labels.clone())


ONE_EACH = '; it must not take the mean of the examples (reduction="none")'


class _Checked:
    """A function whose answers are checked: one number an example."""

    def __init__(self, name: str, function: Loss) -> None:
        self.name = name
        self.function = function

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        values = self.function(outputs.clone(), labels.clone())
        if not _is_one_each(values, len(outputs)):
            is_mean = isinstance(values, Tensor) and not values.ndim
            raise TypeError(
                f"{self.name} must return a tensor ({len(outputs)},), got {described(values)}"
                + (ONE_EACH if is_mean else "")
            )
        return values


def _is_one_each(values: Any, count: int) -> bool:
    return isinstance(values, Tensor) and values.shape == (count,)
