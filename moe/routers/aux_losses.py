"""The auxiliary losses of a layer, from its forward passes to their collection.

The graph of a loss reaches through everything before its layer, so whoever holds the loss holds all
of that in memory. Here a loss belongs to the output of its pass: it lives as long as the output's
graph and goes with it. Only its value stays.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels.route import recomputing, transformed

# A pass on a plain tensor has no graph before its layer, so its loss is kept, whoever keeps the
# output. No more than this many, because it may be that nobody ever collects them.
KEPT_WITHOUT_OUTPUT = 8

NO_GRAD = (
    "its forward pass recorded no gradient, as under torch.no_grad() or the reentrant form of "
    "activation checkpointing: use checkpoint(…, use_reentrant=False), and model.eval() for "
    "passes that do not train"
)
DISCARDED = "the output of its forward pass was discarded: keep the output until then"
FREED = "a backward pass freed its graph: collect the loss before you call backward()"


class AuxLosses:
    """The losses of one layer's passes since the last collection.

    A pass that activation checkpointing repeats inside the backward pass adds nothing. Passes that
    lost their gradient, such as those of an attack that makes the images to train on, count only
    where no pass has one. Compiled code keeps the loss of the last call of its graph.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._compiled: Tensor | None = None
        self._values: Tensor | None = None  # the sum over passes that have no gradient any more
        self._reason = ""  # why they have none

    def add(self, loss: Tensor | None, x: Tensor, y: Tensor) -> None:
        """Keep the loss of one pass of the layer, from x to y."""
        if loss is None or recomputing() or torch.compiler.is_exporting():
            return
        if torch.compiler.is_compiling():  # compiled code knows neither weak references nor hooks
            earlier = self._compiled if _was_traced_before(self) else None
            self._compiled = loss if earlier is None else earlier + loss
            return

        self._forget_graphs_that_are_gone()
        node = None if transformed() else y.grad_fn
        each = _Pass(loss, keep=node is None or x.grad_fn is None)
        if node is not None:
            node.register_prehook(partial(_on_backward, each, [loss]))
        self._passes.append(each)

    def total(self) -> Tensor | None:
        """The sum of the losses that have a gradient; of their values where none has; None where
        there is no loss."""
        self._forget_graphs_that_are_gone()
        terms = [each.loss() for each in self._passes] + [self._compiled]
        losses = [term for term in terms if term is not None] or [self._values]
        return None if losses[0] is None else torch.stack(losses).sum()

    def take(self) -> tuple[Tensor | None, str]:
        """(``total()``, why it has no gradient or ""); no loss is left here."""
        total = self.total()
        reason = "" if self._passes or self._compiled is not None else self._reason
        self._passes = []
        self._compiled = None
        self._values = None
        self._reason = ""
        return total, reason

    def _forget_graphs_that_are_gone(self) -> None:
        """Of a pass without a gradient the value stays; of one that ended inside a transform of
        torch.func nothing does."""
        kept = [each for each in self._passes if each.kept is not None]
        for each in kept[: -KEPT_WITHOUT_OUTPUT + 1]:
            each.release(DISCARDED)

        passes = [each for each in self._passes if transformed() or not each.transformed]
        self._passes = [each for each in passes if each.loss() is not None]
        for each in passes:
            if each.loss() is None:
                value = each.value
                self._values = value if self._values is None else self._values + value
                self._reason = each.reason or DISCARDED

    def __reduce__(self) -> tuple[type["AuxLosses"], tuple[()]]:
        """Copies and pickles leave the losses behind: a graph cannot be copied."""
        return AuxLosses, ()


class _Pass:
    """The loss of one pass. ``kept``: the loss where it is held here; None where the graph of the
    output holds it."""

    def __init__(self, loss: Tensor, *, keep: bool) -> None:
        self.transformed = transformed()
        self.value = loss.detach()
        self.reason = ""
        self.kept: Tensor | None = loss if keep else None
        self._held_by_output = weakref.ref(loss)
        if not loss.requires_grad and not self.transformed:
            self.release(NO_GRAD)

    def loss(self) -> Tensor | None:
        """The loss with its graph; None once that is gone."""
        if self.reason:
            return None
        return self._held_by_output() if self.kept is None else self.kept

    def release(self, reason: str) -> None:
        self.reason = reason
        self.kept = None


def _on_backward(each: _Pass, held: list[Tensor], _: object) -> None:
    """Runs where the backward pass reaches the output of the layer. In ``held`` the graph of the
    output holds the loss."""
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        held.clear()
        each.release(FREED)


# For each trace of torch.compile the layers it has met. A loss of an earlier run of the compiled
# code must not become an input of it: its graph may be gone.
_TRACED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


def _was_traced_before(losses: AuxLosses) -> bool:
    """Whether the trace that is under way has met this layer already."""
    met = _TRACED.setdefault(torch._guards.TracingContext.get(), set())
    before = id(losses) in met
    met.add(id(losses))
    return before


# What torch.compiler.assume_constant_result sets, without the import of the compiler.
_was_traced_before._dynamo_marked_constant = True  # type: ignore[attr-defined]
