"""Do something when the backward pass of a loss ends, in a loop that knows nothing of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class EndOfBackward:
    """Runs ``action`` once: when the backward pass of the watched loss ends, or before.

    The pass may be ``loss.backward()`` or ``torch.autograd.grad``, of the loss or of anything that
    is made of it, with checkpointing or without. The action also runs where the pass raises, where
    the loss is thrown away, and where ``finish`` is called.

    Args:
        action: takes nothing. It must not fail.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action

    def watch(self, loss: Tensor) -> Tensor:
        """The same loss, to hand on in place of this one. A loss without a graph has no backward
        pass, so the action runs at once."""
        if not loss.requires_grad:
            self.finish()
            return loss
        watched: Tensor = _Watched.apply(loss, _Ending(self))
        return watched

    def finish(self) -> None:
        """Run the action now, if it did not run yet."""
        action, self._action = self._action, None
        if action is not None:
            action()


def during_backward(loss: Tensor, block: Callable[[], AbstractContextManager[object]]) -> None:
    """Every backward pass from this loss runs inside a ``block()``, which checkpointing finds as
    the forward pass did. The block is left at the end of the pass, where the pass raises, too.
    Nothing happens to a loss that is thrown away."""

    def enter(_: Tensor) -> None:
        stack = ExitStack()
        Variable._execution_engine.queue_callback(_Ending(EndOfBackward(stack.close)))
        stack.enter_context(block())  # an interrupt from here on leaves it again

    if loss.requires_grad:
        loss.register_hook(enter)


class _Ending:
    """Finishes when it is called, and when nobody needs it any more."""

    def __init__(self, end: EndOfBackward) -> None:
        self.end = end

    def __call__(self) -> None:
        self.end.finish()

    def __del__(self) -> None:
        self.end.finish()


class _Watched(torch.autograd.Function):
    """The identity. Its backward pass, the first of all, asks the engine for a call at the end."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, ending: _Ending) -> Tensor:
        ctx.ending = ending  # lives as long as the graph of the loss
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The engine lets go of what it is given after an error, too, and that finishes.
        Variable._execution_engine.queue_callback(_Ending(ctx.ending.end))
        return grad, None
