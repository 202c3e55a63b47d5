"""The auxiliary losses of a layer, from its forward passes to their collection.

The graph of a loss reaches through everything before its layer, so whoever holds the loss holds all
of that in memory. Here a loss belongs to the output of its pass: it lives as long as the output's
graph and goes with it. Only its value stays.
"""

import weakref
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
    """The losses of one layer's passes since the last collection. A pass that activation
    checkpointing repeats inside the backward pass adds nothing."""

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._compiled: Tensor | None = None  # the sum over passes inside torch.compile
        self._values: Tensor | None = None  # the sum over passes that have no gradient any more
        self._reason = ""  # why they have none

    def add(self, loss: Tensor | None, x: Tensor, y: Tensor) -> None:
        """Keep the loss of one pass of the layer, from x to y."""
        if loss is None or recomputing():
            return
        if torch.compiler.is_compiling():  # compiled code knows neither weak references nor hooks
            self._compiled = loss if self._compiled is None else self._compiled + loss
            return

        self._forget_graphs_that_are_gone()
        node = None if transformed() else y.grad_fn
        each = _Pass(loss, keep=node is None or x.grad_fn is None)
        if node is not None:
            node.register_prehook(partial(_on_backward, each, loss))
        self._passes.append(each)

    def total(self) -> Tensor | None:
        """The sum of the losses, with the gradients they have still; None where there is none."""
        self._forget_graphs_that_are_gone()
        kept = [each.loss() for each in self._passes]
        terms = [term for term in (self._values, self._compiled, *kept) if term is not None]
        return sum((term.to(terms[0].device) for term in terms[1:]), terms[0]) if terms else None

    def take(self) -> tuple[Tensor | None, str]:
        """(``total()``, why a part of it has no gradient or ""); no loss is left here."""
        total, reason = self.total(), self._reason
        self._passes = []
        self._compiled = None
        self._values = None
        self._reason = ""
        return total, reason

    def _forget_graphs_that_are_gone(self) -> None:
        """Of a pass without a gradient the value stays; of one that ended inside a transform of
        torch.func nothing does."""
        if torch.compiler.is_compiling():
            return
        if isinstance(self._compiled, FakeTensor):  # torch.export traced a pass, and nothing ran
            self._compiled = None
        kept = [each for each in self._passes if each.kept]
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
    """The loss of one pass. ``kept``: whether it is held here; otherwise the graph of the output
    holds it."""

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


def _on_backward(each: _Pass, loss: Tensor, _: object) -> None:
    """Runs where the backward pass reaches the output of the layer. The argument ``loss`` is the
    reference by which the graph of the output holds it."""
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        each.release(FREED)
