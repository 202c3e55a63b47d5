"""What an attack is after: the base class of goals."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, …), labels (B, …)) → (B,), one value an example."""


class Goal(ABC):
    """What a success is, and what the search raises to come to one.

    Outputs are one floating point tensor (B, …), whatever the model gives for B examples;
    ``logits_fn`` makes it of other outputs. Labels are a tensor (N, …) with one entry an example.
    Nothing here waits for the device.
    """

    has_classes: ClassVar[bool] = False
    """Outputs are one score a class, (B, C), and labels are classes (N,)."""

    targeted: bool = False
    """Labels are what to reach, not what to leave."""

    @property
    def losses(self) -> Mapping[str, Loss]:
        """name → loss, of all losses that serve this goal; the search raises them. One that is
        called "margin" is above 0 where the goal is reached, and below 0 where it is not."""
        return {}

    @property
    def usual_loss(self) -> str | None:
        """The loss of attacks that are given none."""
        return None

    @property
    def has_loss(self) -> bool:
        """Whether an attack may be given no loss: there is a usual one, or a class of a user's own
        says what ``loss`` is."""
        return self.usual_loss is not None or type(self).loss is not Goal.loss

    @abstractmethod
    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,) bool: these outputs are a success."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(R,) what the search raises where the attack was given no loss."""
        return self.loss_named(None)(outputs, labels)

    def loss_named(self, loss: str | Loss | None) -> Loss:
        """The loss that the search raises: one of ``losses`` by its name, a callable, or the usual
        one.

        Raises:
            ValueError: there is no loss of this name for this goal.
        """
        if callable(loss):
            return loss
        if loss is None and type(self).loss is not Goal.loss:
            return self.loss
        name = self.usual_loss if loss is None else loss
        if not self.losses:
            raise ValueError(f"loss must be a callable for {self}, which has none, got {loss!r}")
        if name is None or name not in self.losses:
            raise ValueError(
                f"loss must be one of {tuple(self.losses)} or a callable for {self}, got {loss!r}"
            )
        return self.losses[name]

    def chosen_loss(self, loss: str | Loss | None) -> Loss:
        """The loss as a user knows it, which a journal names."""
        return self.loss_named(loss)

    def prediction(self, outputs: Tensor) -> Tensor:
        """(R,) int64 the class that the model names; −1 where an output is no single class."""
        return torch.full((len(outputs),), -1, dtype=torch.int64, device=outputs.device)

    def figure(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """(R,) one number that says how far an example is from the goal or beyond it; None: the
        verdict says it all."""
        return None

    def check_labels(self, labels: Any, count: int) -> None:
        """TypeError: labels are no tensor with one entry for each of ``count`` examples."""
        if not isinstance(labels, Tensor) or not labels.ndim or len(labels) != count:
            raise TypeError(
                f"labels must be a tensor ({count}, …) for {self}, got {described(labels)}"
            )

    def checked_outputs(self, outputs: Any, count: int) -> Tensor:
        """The model's outputs. TypeError: they are no float tensor (count, …)."""
        is_tensor = isinstance(outputs, Tensor) and outputs.is_floating_point()
        if not is_tensor or not outputs.ndim or len(outputs) != count:
            raise TypeError(
                f"model must return a float tensor ({count}, …) for {self}, or logits_fn make one "
                f"of its outputs, got {described(outputs)}"
            )
        return outputs

    def check(self, outputs: Tensor, labels: Tensor) -> None:  # noqa: B027 (most goals take all)
        """ValueError: labels (N, …) that do not go with outputs (N, …)."""

    def bad(self, outputs: Tensor) -> Tensor:
        """(R,) bool: nothing can be said of these outputs, since they are not finite."""
        return ~outputs.unsqueeze(-1).flatten(1).isfinite().all(1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def described(value: Any) -> str:
    """What an error message says of a value: dtype and shape of a tensor, else the class."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
