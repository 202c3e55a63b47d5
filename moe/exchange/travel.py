"""Rows from rank to rank, and their gradients the same way back.

An exchange has two autograd nodes: one that starts it and one that waits for it. What is computed
between them, such as shared experts, runs while rows travel, in the backward pass, too: there the
second node starts the way back and the first one waits for it. The derivative of an exchange is
the exchange in the other direction, so derivatives of any order are right.

Between the two nodes the gradient has the size of the rows on one side, and what comes back that of
the other, so autograd cannot carry it: it lies in the ``Way`` meanwhile.
"""

from typing import Any

import torch
from torch import Tensor

from ironmoe.moe.exchange.group import Group


class Way:
    """How many rows each rank of the group sends to this one, and gets from it.

    Args:
        group: the ranks.
        send, receive: rows to and from each rank. Every rank knows its own numbers only.

    gradient: what comes back along it in a backward pass that is between the two nodes.
    """

    def __init__(self, group: Group, send: list[int], receive: list[int]) -> None:
        self.group = group
        self.send = send
        self.receive = receive
        self.gradient: Tensor | None = None
        self._under_way: Any = None
        self._back: Way | None = None

    @property
    def back(self) -> "Way":
        """The opposite direction."""
        if self._back is None:
            self._back = Way(self.group, self.receive, self.send)
        return self._back

    def start(self, rows: Tensor) -> Tensor:
        """(Σ receive, D), whose values are there after ``finish``."""
        rows = rows.contiguous()
        received = rows.new_empty(sum(self.receive), rows.shape[1])
        # as bytes, since gloo does not have all dtypes
        given, taken = rows.view(torch.uint8), received.view(torch.uint8)
        work = self.group.start_rows(taken, given, self.receive, self.send, "rows")
        # the memory of the rows must stay until they have left
        self._under_way = work, rows
        if torch.is_anomaly_enabled():  # it reads values between the two nodes
            self.finish()
        return received

    def finish(self) -> None:
        """Wait for what ``start`` began."""
        if self._under_way is not None:
            self.group.finish_rows(self._under_way[0])
            self._under_way = None


def start(rows_RD: Tensor, way: Way) -> Tensor:
    """Begin to send rows (R, D) along a way. The result may only be given to ``finish``."""
    return _Start.apply(rows_RD, way)


def finish(rows_RD: Tensor, way: Way) -> Tensor:
    """The rows that other ranks sent, (Σ receive, D)."""
    return _Finish.apply(rows_RD, way)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.start(rows)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        gradient, ctx.way.gradient = ctx.way.gradient, None
        return finish(gradient, ctx.way.back), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        way.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.way.gradient = start(grad, ctx.way.back)
        return grad, None
