"""The auxiliary losses of a layer, from its forward passes to their collection.

The graph of a loss reaches through everything before its layer, so whoever holds the loss holds all
of that in memory. Of a layer's passes only the latest is held here, until the layer goes into eval
mode. The loss of an earlier one lives as long as the graph of its output.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels.route import recomputing, transformed

# A pass on a plain tensor has no graph before its layer, so several are held. No more than this
# many, because it may be that nobody ever collects them.
MOST_HELD = 8

NO_GRAD = (
    "a forward pass recorded no gradient, as under torch.no_grad() or the reentrant form of "
    "activation checkpointing. Use checkpoint(…, use_reentrant=False); call model.eval() before a "
    "pass that does not train"
)
DISCARDED = (
    "the output of a forward pass was discarded before the next pass. Keep it until the "
    "collection; collect once to forget a pass that was given up"
)
CONSTANT = "no loss has a weight, or nothing before the layer requires a gradient"
FREED = "a backward pass freed its graph: collect the loss before you call backward()"


class AuxLosses:
    """The losses of one layer's passes since the last collection.

    A pass that activation checkpointing repeats inside the backward pass adds nothing. Passes that
    a backward pass has used up, such as those of an attack that makes the images to train on, count
    only where there is no other. Compiled code keeps the losses of the last run of its graph, those
    with gradients apart from those without.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._compiled: Tensor | None = None
        self._compiled_value: Tensor | None = None  # of a pass without gradients
        self._values: dict[str, Tensor] = {}  # why losses lost their gradient → the sum of these

    def add(self, loss: Tensor | None, x: Tensor, y: Tensor, *, keep: bool = False) -> None:
        """Take the loss of one pass of the layer, from x to y. keep: hold it after the next pass,
        too, whatever becomes of its output."""
        if loss is None or recomputing() or torch.compiler.is_exporting():
            return
        if torch.compiler.is_compiling():  # compiled code knows neither weak references nor hooks
            name = "_compiled" if torch.is_grad_enabled() else "_compiled_value"
            earlier = getattr(self, name) if _was_traced_before(self, name) else None
            setattr(self, name, loss if earlier is None else earlier + loss)
            return

        self.let_go()
        self._forget_graphs_that_are_gone()
        node = None if transformed() else y.grad_fn
        each = _Pass(loss, keep=keep or node is None or x.grad_fn is None)
        if node is not None:
            node.register_prehook(partial(_on_backward, each, [loss]))
        self._passes.append(each)

    def let_go(self) -> None:
        """From now on the losses live as long as the graphs of their outputs."""
        for each in self._passes:
            each.let_go()

    def total(self) -> Tensor | None:
        """The sum of the losses, with the gradients they have still; None where there is none."""
        return self._sum()[0]

    def take(self) -> tuple[Tensor | None, str]:
        """(``total()``, why a part of it has no gradient or ""); no loss is left here."""
        total_and_reason = self._sum()
        self._hold([], None, None, {})
        return total_and_reason

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside the block no loss is here; those of the block are forgotten, and the former ones
        are back afterwards. It stays the same object, which compiled code looks for."""
        former = self._passes, self._compiled, self._compiled_value, self._values
        self._hold([], None, None, {})
        try:
            yield
        finally:
            self._hold(*former)

    def _hold(
        self,
        passes: list["_Pass"],
        compiled: Tensor | None,
        compiled_value: Tensor | None,
        values: dict[str, Tensor],
    ) -> None:
        self._passes = passes
        self._compiled = compiled
        self._compiled_value = compiled_value
        self._values = values

    def _sum(self) -> tuple[Tensor | None, str]:
        self._forget_graphs_that_are_gone()
        values = dict(self._values)
        if self._compiled_value is not None:
            values[NO_GRAD] = _added(values.get(NO_GRAD), self._compiled_value)
        terms = [each.loss() for each in self._passes] + [self._compiled]
        used_up = values.pop(FREED, None)
        losses = [term for term in (*terms, *values.values()) if term is not None]
        reason = next((reason for reason in values if reason != CONSTANT), "")
        if not losses and used_up is not None:
            return used_up, FREED
        total = None
        for loss in losses:
            total = _added(total, loss)
        return total, reason

    def _forget_graphs_that_are_gone(self) -> None:
        """Of a pass without a gradient the value stays; of one that ended inside a transform of
        torch.func nothing does."""
        if torch.compiler.is_compiling():
            return
        if self._compiled is not None and _is_freed(self._compiled):
            self._values[FREED] = self._compiled.detach()
            self._compiled = None
        passes = [each for each in self._passes if transformed() or not each.transformed]
        for each in passes[:-MOST_HELD]:
            each.let_go(even_kept=True)

        self._passes = [each for each in passes if each.loss() is not None]
        for each in passes:
            if each.loss() is None:
                reason = each.reason or DISCARDED
                self._values[reason] = _added(self._values.get(reason), each.value)

    def __reduce__(self) -> tuple[type["AuxLosses"], tuple[()]]:
        """Copies and pickles leave the losses behind: a graph cannot be copied."""
        return AuxLosses, ()


class _Pass:
    """The loss of one pass, held here or by the graph of its output alone."""

    def __init__(self, loss: Tensor, *, keep: bool) -> None:
        self.transformed = transformed()
        self.value = loss.detach()
        self.reason = ""
        if not (loss.requires_grad or self.transformed):
            self.reason = CONSTANT if torch.is_grad_enabled() else NO_GRAD
        self.keep = keep
        self._held: Tensor | None = loss
        self._of_output = weakref.ref(loss)

    def loss(self) -> Tensor | None:
        """The loss with its graph; None once that is gone."""
        return None if self.reason else self._of_output()

    def let_go(self, *, even_kept: bool = False) -> None:
        if even_kept or not self.keep:
            self._held = None

    def used_up(self) -> None:
        self.reason = self.reason or FREED
        self._held = None


def _added(total: Tensor | None, loss: Tensor) -> Tensor:
    return loss if total is None else total + loss.to(total.device)


def _is_freed(loss: Tensor) -> bool:
    """Whether a backward pass has freed the graph of a loss of compiled code, which is one node."""
    try:
        getattr(loss.grad_fn, "_raw_saved_tensors", ())
    except RuntimeError:  # torch's only sign of it
        return True
    return False


def _on_backward(each: _Pass, held: list[Tensor], _: object) -> None:
    """Runs where the backward pass reaches the output of the layer. In ``held`` the graph of the
    output holds the loss."""
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        held.clear()
        each.used_up()


# For each trace of torch.compile the layers it has met. A loss of an earlier run of the compiled
# code must not become an input of it: its graph may be gone.
_TRACED: weakref.WeakKeyDictionary[Any, set[tuple[int, str]]] = weakref.WeakKeyDictionary()


def _was_traced_before(losses: AuxLosses, name: str) -> bool:
    """Whether the trace that is under way has met this attribute of this layer already."""
    met = _TRACED.setdefault(torch._guards.TracingContext.get(), set())
    before = (id(losses), name) in met
    met.add((id(losses), name))
    return before


# What torch.compiler.assume_constant_result sets, without the import of the compiler.
_was_traced_before._dynamo_marked_constant = True  # type: ignore[attr-defined]
