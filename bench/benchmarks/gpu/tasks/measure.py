"""Measure one layer under one routing: check how far each is from the reference, then time them
beside each other.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from ironmoe.bench.benchmarks.gpu.journal import BROKEN_DEVICE, Pen
from ironmoe.bench.benchmarks.gpu.tasks.observe import Clocks, kernel_times
from ironmoe.bench.benchmarks.passes import (
    DX,
    FULL,
    INFERENCE,
    PASSES,
    PGD,
    Build,
    peak_bytes,
    saved_bytes,
)
from ironmoe.bench.benchmarks.peers import (
    DENSE,
    IRONMOE,
    OURS,
    PEERS,
    TOLERANCE,
    dense,
    disagreement,
    errors,
    reference,
)
from ironmoe.bench.benchmarks.roofline import (
    Work,
    combine_work,
    dispatch_work,
    limit_ms,
    linf_step_work,
    needed_flops,
    topk_work,
)
from ironmoe.bench.benchmarks.shapes import Problem, Shape, dense_problem, make_problem
from ironmoe.bench.common.timing import (
    Clock,
    OutOfTime,
    Timing,
    copy,
    interleaved,
    square_product,
    time_limit,
)
from ironmoe.kernels import combine, topk_route
from ironmoe.kernels.attack_step import linf_step
from ironmoe.kernels.dispatch import plan_with_tiles

CHECK_SECONDS = 45.0  # for a peer to compile, tune itself and be checked
PRODUCT, COPY = "product", "copy"
CHECK, MOVERS, PROFILE = (
    "check",
    "kernels that move rows",
    "kernels in a pass",
)  # parts beside the passes

Row = dict[str, Any]
T = TypeVar("T")


class Entrant(NamedTuple):
    """An implementation that is timed: on which tensors, how far it is from the reference, and in
    words if that is too far.
    """

    build: Build
    problem: Problem
    error: float | None = None
    disagreement: str | None = None
    captures: bool = False


class Case:
    """One layer under one routing, written pass by pass; notes say who was not measured and why."""

    def __init__(
        self, shape: Shape, routing: str, dtype: torch.dtype, device: torch.device, clock: Clock,
        pen: Pen,
        rounds: int = 20, without: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """``without``: peers that are left out, because an earlier process died of them."""
        self.shape, self.routing, self.dtype, self.device, self.clock = (
            shape,
            routing,
            dtype,
            device,
            clock,
        )
        self.pen, self.rounds, self.without = pen, rounds, without
        self.rows: list[Row] = []
        self.notes: list[dict[str, str]] = []

    def measure(self, clocks: Clocks) -> bool:
        """Everything that the clock allows and that ``pen`` has not got yet. Whoever fails costs
        its own rows only.

        Returns:
            True if nothing is left to do.

        Raises:
            RuntimeError: the device is in a state in which nothing runs any more.
        """
        passes = [name for name in PASSES if name != PGD or self.device.type == "cuda"]
        missing = [part for part in (*passes, MOVERS, PROFILE) if part not in self.pen.done]
        try:
            for part in self._ready(missing, clocks):
                if self.clock.left() <= 0:
                    return False
                part()
        finally:
            if self.notes:
                self._flush("notes")
        return self.clock.left() > 0 or all(part in self.pen.done for part in missing)

    def _ready(self, missing: list[str], clocks: Clocks) -> list[Callable[[], None]]:
        """What is left to do, once everything that it needs is there; nothing if we cannot do this
        layer at all.
        """
        problem = (
            self._attempt(
                "all", partial(make_problem, self.shape, self.routing, self.dtype, self.device)
            )
            if missing
            else None
        )
        entrants = {} if problem is None else self._check(problem)
        if problem is None or OURS not in entrants:
            return []
        limit = self._attempt(DENSE, partial(dense_problem, problem), part=DENSE)
        if limit is not None:
            entrants[DENSE] = Entrant(dense, limit)
        others = {
            MOVERS: partial(self._measure_movers, problem),
            PROFILE: partial(self._profile, entrants[OURS]),
        }
        return [
            others[part] if part in others else partial(self._measure_pass, part, entrants, clocks)
            for part in missing
        ]

    def _check(self, problem: Problem) -> dict[str, Entrant]:
        """All that can do the problem, those that compute something else too: that is shown beside
        their times.
        """
        entrants: dict[str, Entrant] = {}
        correct = self._attempt("reference", partial(reference, problem))
        if correct is None:
            return entrants
        for name, peer in {OURS: IRONMOE, **PEERS}.items():
            if why := peer.why_not(problem):
                self._note(name, "absent", why)
                continue
            if name in self.without:
                continue
            found = self._attempt(
                name, partial(errors, peer.build, problem, correct), _seconds(name)
            )
            if found is None:
                continue
            if why := disagreement(found, self.dtype):
                self._note(name, "disagrees", why)
            worst = max(found.values(), key=lambda error: error if error == error else float("inf"))
            entrants[name] = Entrant(peer.build, problem, worst, why, peer.captures)
        self._flush(CHECK)
        return entrants

    def _measure_pass(self, pass_name: str, entrants: dict[str, Entrant], clocks: Clocks) -> None:
        prepared = {}
        for name, entrant in entrants.items():
            if pass_name == PGD and not entrant.captures:
                continue
            ready = self._attempt(
                name, partial(_prepare, pass_name, entrant), _seconds(name), pass_name
            )
            if ready is not None:
                prepared[name] = ready
        size = 8192 if self.device.type == "cuda" else 256
        runs = {
            PRODUCT: square_product(size, self.device),
            **{name: run for name, (run, _) in prepared.items()},
        }
        start = time.monotonic()
        timings = self._attempt(
            "all", partial(interleaved, runs, self.device, self.rounds), part=pass_name
        )
        if timings is None or OURS not in prepared:
            return
        for name, (_, memory) in prepared.items():
            tflops = needed_flops(self.shape, pass_name) / timings[name].ms * 1e-9
            product_tflops = 2 * size**3 / timings[PRODUCT].ms * 1e-9
            limit = limit_ms(self.shape, pass_name) if self.dtype.itemsize == 2 else None
            figures = {
                "tflops": tflops,
                "share_of_product": tflops / product_tflops,
                "product_tflops": product_tflops,
            }
            agreement = _agreement(entrants[name], self.dtype)
            self._add(
                name,
                pass_name,
                timings[name],
                {**figures, "limit_ms": limit, **memory, **agreement, **clocks.since(start)},
            )
        self._flush(pass_name)

    def _measure_movers(self, problem: Problem) -> None:
        for name, timing, figures in (
            self._attempt(OURS, partial(_time_movers, problem, self.rounds), part=MOVERS) or []
        ):
            self._add(OURS, f"kernel {name}", timing, figures)
        self._flush(MOVERS)

    def _profile(self, ours: Entrant) -> None:
        """The time of every kernel by itself, in the passes of inference and training."""
        found: list[Row] = []
        for pass_name in (INFERENCE, FULL):
            run = PASSES[pass_name](ours.build, ours.problem)
            launches = self._attempt(OURS, partial(kernel_times, run, self.device), part=PROFILE)
            if launches == []:
                self._note(OURS, "absent", "the profiler gives no kernel times here")
            found += [
                {**self._place(), "pass": pass_name, **launch._asdict()}
                for launch in launches or ()
            ]
        self._flush(PROFILE, kernels=found)

    def _place(self) -> Row:
        return {"shape": self.shape.name, "routing": self.routing, "dtype": _short(self.dtype)}

    def _flush(self, part: str, **other: list[Row]) -> None:
        self.pen.finish(part, rows=self.rows, notes=self.notes, **other)
        self.rows, self.notes = [], []

    def _add(self, name: str, pass_name: str, timing: Timing, figures: dict[str, Any]) -> None:
        shape = self.shape
        self.rows.append({
            "implementation": name, "pass": pass_name, "sizes": shape.sizes,
            "activation": shape.activation,
            "bias": shape.bias, **self._place(), **timing._asdict(), **figures,
        })  # fmt: skip

    def _note(self, name: str, kind: str, why: str) -> None:
        """``kind``: absent, disagrees, failed, or no time."""
        self.notes.append({"implementation": name, **self._place(), "kind": kind, "why": why})

    def _attempt(
        self, name: str, work: Callable[[], T], seconds: float = float("inf"), part: str = CHECK
    ) -> T | None:
        """The result of ``work``; None, and a note, if it fails or takes longer than its seconds or
        the clock allows.
        """
        seconds = min(seconds, self.clock.left())
        self.pen.begin(part, name)
        try:
            with time_limit(seconds):
                return work()
        except OutOfTime:
            self._note(name, "no time", f"{part}: took longer than {max(seconds, 0):.0f} s")
        except Exception as error:  # whatever a peer throws; a note has it
            first_line = (str(error).strip().splitlines() or [""])[0]
            self._note(name, "failed", f"{part}: {type(error).__name__}: {first_line}"[:300])
            if any(sign in str(error) for sign in BROKEN_DEVICE):
                self._flush(f"{part} of {name}")
                raise RuntimeError(
                    f"{name} broke the device at {self.shape.name}, {part}: {error}"
                ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _agreement(entrant: Entrant, dtype: torch.dtype) -> dict[str, Any]:
    if entrant.error is None:
        return {}
    return {
        "error": entrant.error,
        "allowed": TOLERANCE[dtype],
        "agrees": entrant.disagreement is None,
    }


def _prepare(pass_name: str, entrant: Entrant) -> tuple[Callable[[], Any], dict[str, int | None]]:
    """(what is timed, its memory)."""
    build, problem = entrant.build, entrant.problem
    saved = None
    if pass_name not in (INFERENCE, PGD):
        saved = saved_bytes(build, problem.frozen() if pass_name == DX else problem)
    run = PASSES[pass_name](build, problem)
    run()  # what is compiled or allocated once and for all is not the peak of a call
    # a graph has its memory already
    peak = None if pass_name == PGD else peak_bytes(run, problem.x.device)
    return run, {"peak_bytes": peak, "saved_bytes": saved}


def _time_movers(problem: Problem, rounds: int) -> list[tuple[str, Timing, dict[str, Any]]]:
    """The kernels that move memory, beside a copy."""
    shape, device, dtype = problem.shape, problem.x.device, problem.x.dtype
    logits = torch.randn(shape.tokens, shape.num_experts, device=device)
    routing = problem.routing._replace(gates=problem.gates.detach())
    dispatch, _ = plan_with_tiles(problem.experts, shape.num_experts, dtype)
    rows = torch.randn(shape.rows, shape.dim, device=device, dtype=dtype)
    point = torch.rand(shape.tokens, shape.dim, device=device)
    low, high, alpha = point - 0.1, point + 0.1, torch.full((shape.tokens,), 0.01, device=device)
    torch.testing.assert_close(
        topk_route(logits, shape.top_k).gates, logits.softmax(1).topk(shape.top_k).values
    )  # fmt: skip
    kernels: list[tuple[Work, Callable[[], Any]]] = [
        (topk_work(shape), lambda: topk_route(logits, shape.top_k)),
        (dispatch_work(shape), lambda: plan_with_tiles(problem.experts, shape.num_experts, dtype)),
        (combine_work(shape, dtype.itemsize), lambda: combine(rows, routing, dispatch)),
        (
            linf_step_work(shape, dtype.itemsize),
            lambda: linf_step(point, problem.dy, low, high, alpha, image_dtype=dtype),
        ),
    ]
    copied = 1 << (30 if device.type == "cuda" else 22)
    timings = interleaved(
        {COPY: copy(copied, device), **{work.kernel: run for work, run in kernels}}, device, rounds
    )
    copy_rate = 2 * copied / timings[COPY].ms * 1e-6
    figures = []
    for work, _ in kernels:
        rate = work.bytes / timings[work.kernel].ms * 1e-6
        shares = {
            "gb_per_s": rate,
            "copy_gb_per_s": copy_rate,
            "share_of_copy": rate / copy_rate,
            "limit_ms": work.ms,
        }
        figures.append((work.kernel, timings[work.kernel], shares))
    return figures


def _seconds(name: str) -> float:
    """A peer's; without us there is nothing to compare with, so we get what the clock has."""
    return float("inf") if name == OURS else CHECK_SECONDS


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
