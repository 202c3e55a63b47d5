"""Who is timed on a layer, on which tensors, and how one of its passes is prepared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ironmoe.bench.benchmarks.gpu.run_log import Row
from ironmoe.bench.benchmarks.passes import (
    DX,
    INFERENCE,
    PASSES,
    PGD,
    Build,
    peak_bytes,
    saved_bytes,
)
from ironmoe.bench.benchmarks.reference import TOLERANCE
from ironmoe.bench.benchmarks.shapes import Problem, Shape
from ironmoe.bench.common.dtypes import dtype_name


@dataclass(frozen=True)
class Place:
    """What is measured, and where."""

    shape: Shape
    routing: str
    dtype: torch.dtype
    device: torch.device

    def as_row(self) -> Row:
        """The fields by which a row of the results is found."""
        dtype = dtype_name(self.dtype)
        return {"shape": self.shape.name, "routing": self.routing, "dtype": dtype}


class Entrant(NamedTuple):
    """An implementation that is timed.

    problem: the tensors it is timed on; error: how far it is from the reference; disagreement: in
    words, if that is too far; captures: whether a CUDA graph can hold it.
    """

    build: Build
    problem: Problem
    error: float | None = None
    disagreement: str | None = None
    captures: bool = False

    def agreement(self, dtype: torch.dtype) -> Row:
        """The fields of a row that say how far it is from the reference."""
        if self.error is None:
            return {}
        agrees = self.disagreement is None
        return {"error": self.error, "allowed": TOLERANCE[dtype], "agrees": agrees}


class Prepared(NamedTuple):
    """One pass of one entrant: what is timed, and the fields of a row about its memory."""

    run: Callable[[], Any]
    memory: Row


def prepare(pass_name: str, entrant: Entrant) -> Prepared:
    """Build the pass, run it once, and measure its memory."""
    build, problem = entrant.build, entrant.problem
    saved = None
    if pass_name not in (INFERENCE, PGD):
        saved = saved_bytes(build, problem.frozen() if pass_name == DX else problem)

    run = PASSES[pass_name](build, problem)
    run()  # the first call compiles and allocates what later calls find
    # a graph has allocated its memory before
    peak = None if pass_name == PGD else peak_bytes(run, problem.x.device)
    return Prepared(run, {"peak_bytes": peak, "saved_bytes": saved})
