"""Measure one layer under one routing: check who computes the same as the reference, then time them beside each other."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from ironmoe.bench.passes import DX, INFERENCE, PASSES, PGD, Build, peak_bytes, saved_bytes
from ironmoe.bench.peers import DENSE, IRONMOE, OURS, PEERS, dense, disagreement, errors, reference
from ironmoe.bench.roofline import Work, combine_work, dispatch_work, limit_ms, linf_step_work, needed_flops, topk_work
from ironmoe.bench.shapes import Problem, Shape, dense_problem, make_problem
from ironmoe.bench.timing import OutOfTime, Timing, copy, interleaved, square_product, time_limit
from ironmoe.kernels import combine, plan_dispatch, topk_route
from ironmoe.kernels.attack_step import linf_step

CHECK_SECONDS = 45.0  # for a peer to compile, tune itself and be checked
PRODUCT, COPY = "product", "copy"
FATAL = ("illegal memory access", "unspecified launch failure", "device-side assert")  # nothing runs after one of these

Row = dict[str, Any]
T = TypeVar("T")


class Clock:
    """What is left of the seconds this program was given."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Entrant(NamedTuple):
    """An implementation that may be timed: on which tensors, and how far it is from the reference."""

    build: Build
    problem: Problem
    error: float | None = None
    captures: bool = False


class Case:
    """One layer under one routing: ``rows``, one a measurement, and ``notes`` on who was not measured and why."""

    def __init__(self, shape: Shape, routing: str, dtype: torch.dtype, device: torch.device, clock: Clock) -> None:
        self.shape, self.routing, self.dtype, self.device, self.clock = shape, routing, dtype, device, clock
        self.rows: list[Row] = []
        self.notes: list[dict[str, str]] = []

    def measure(self) -> None:
        """Everything that the clock allows. Whoever fails costs its own rows only.

        Raises:
            RuntimeError: the device is in a state in which nothing runs any more.
        """
        problem = self._attempt("all", partial(make_problem, self.shape, self.routing, self.dtype, self.device))
        entrants = {} if problem is None else self._check(problem)
        if problem is None or OURS not in entrants:
            return
        limit = self._attempt(DENSE, partial(dense_problem, problem))
        if limit is not None:
            entrants[DENSE] = Entrant(dense, limit)
        for pass_name in PASSES:
            if pass_name != PGD or self.device.type == "cuda":
                self._measure_pass(pass_name, entrants)
        for name, timing, figures in self._attempt(OURS, partial(_time_kernels, problem), what="kernels") or []:
            self._add(OURS, f"kernel {name}", timing, figures)

    def _check(self, problem: Problem) -> dict[str, Entrant]:
        """All that can do the problem and compute what they should."""
        entrants: dict[str, Entrant] = {}
        correct = self._attempt("reference", partial(reference, problem))
        if correct is None:
            return entrants
        for name, peer in {OURS: IRONMOE, **PEERS}.items():
            if why := peer.why_not(problem):
                self._note(name, "absent", why)
                continue
            found = self._attempt(name, partial(errors, peer.build, problem, correct), _seconds(name))
            if found is None:
                continue
            if why := disagreement(found, self.dtype):
                self._note(name, "disagrees", why)
                continue
            entrants[name] = Entrant(peer.build, problem, max(found.values()), peer.captures)
        return entrants

    def _measure_pass(self, pass_name: str, entrants: dict[str, Entrant]) -> None:
        prepared = {}
        for name, entrant in entrants.items():
            if pass_name == PGD and not entrant.captures:
                continue
            ready = self._attempt(name, partial(_prepare, pass_name, entrant), _seconds(name), pass_name)
            if ready is not None:
                prepared[name] = ready
        if OURS not in prepared:
            return
        size = 8192 if self.device.type == "cuda" else 256
        runs = {PRODUCT: square_product(size, self.device), **{name: run for name, (run, _) in prepared.items()}}
        timings = self._attempt("all", partial(interleaved, runs, self.device), what=pass_name)
        if timings is None:
            return
        for name, (_, memory) in prepared.items():
            tflops = needed_flops(self.shape, pass_name) / timings[name].ms * 1e-9
            product_tflops = 2 * size**3 / timings[PRODUCT].ms * 1e-9
            limit = limit_ms(self.shape, pass_name) if self.dtype.itemsize == 2 else None
            figures = {"tflops": tflops, "share_of_product": tflops / product_tflops, "product_tflops": product_tflops}
            self._add(name, pass_name, timings[name], {**figures, "limit_ms": limit, **memory, "error": entrants[name].error})

    def _add(self, name: str, pass_name: str, timing: Timing, figures: dict[str, Any]) -> None:
        shape = self.shape
        self.rows.append({
            "implementation": name, "pass": pass_name, "shape": shape.name, "sizes": shape.sizes, "activation": shape.activation,
            "bias": shape.bias, "routing": self.routing, "dtype": _short(self.dtype), **timing._asdict(), **figures,
        })  # fmt: skip

    def _note(self, name: str, kind: str, why: str) -> None:
        """``kind``: absent, disagrees, failed, or no time."""
        self.notes.append({
            "implementation": name, "shape": self.shape.name, "routing": self.routing, "dtype": _short(self.dtype), "kind": kind, "why": why
        })  # fmt: skip

    def _attempt(self, name: str, work: Callable[[], T], seconds: float = float("inf"), what: str = "check") -> T | None:
        """The result of ``work``; None, and a note, if it fails or takes longer than its seconds or the clock allows."""
        seconds = min(seconds, self.clock.left())
        try:
            with time_limit(seconds):
                return work()
        except OutOfTime:
            self._note(name, "no time", f"{what}: took longer than {max(seconds, 0):.0f} s")
        except Exception as error:  # whatever a peer throws; a note has it
            if any(sign in str(error) for sign in FATAL):
                raise RuntimeError(f"{name} broke the device at {self.shape.name}, {what}: {error}") from error
            first_line = (str(error).strip().splitlines() or [""])[0]
            self._note(name, "failed", f"{what}: {type(error).__name__}: {first_line}"[:300])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _prepare(pass_name: str, entrant: Entrant) -> tuple[Callable[[], Any], dict[str, int | None]]:
    """(what is timed, its memory)."""
    build, problem = entrant.build, entrant.problem
    saved = None
    if pass_name not in (INFERENCE, PGD):
        saved = saved_bytes(build, problem.frozen() if pass_name == DX else problem)
    run = PASSES[pass_name](build, problem)
    run()  # what is compiled or allocated once and for all is not the peak of a call
    peak = None if pass_name == PGD else peak_bytes(run, problem.x.device)  # a graph has its memory already
    return run, {"peak_bytes": peak, "saved_bytes": saved}


def _time_kernels(problem: Problem) -> list[tuple[str, Timing, dict[str, Any]]]:
    """The kernels that move memory, beside a copy."""
    shape, device, dtype = problem.shape, problem.x.device, problem.x.dtype
    logits = torch.randn(shape.tokens, shape.num_experts, device=device)
    routing = problem.routing._replace(gates=problem.gates.detach())
    dispatch = plan_dispatch(problem.experts, shape.num_experts)
    rows = torch.randn(shape.rows, shape.dim, device=device, dtype=dtype)
    point = torch.rand(shape.tokens, shape.dim, device=device)
    low, high, alpha = point - 0.1, point + 0.1, torch.full((shape.tokens,), 0.01, device=device)
    torch.testing.assert_close(topk_route(logits, shape.top_k).gates, logits.softmax(1).topk(shape.top_k).values)
    kernels: list[tuple[Work, Callable[[], Any]]] = [
        (topk_work(shape), lambda: topk_route(logits, shape.top_k)),
        (dispatch_work(shape), lambda: plan_dispatch(problem.experts, shape.num_experts)),
        (combine_work(shape, dtype.itemsize), lambda: combine(rows, routing, dispatch)),
        (linf_step_work(shape, dtype.itemsize), lambda: linf_step(point, problem.dy, low, high, alpha, image_dtype=dtype)),
    ]
    copied = 1 << (30 if device.type == "cuda" else 22)
    timings = interleaved({COPY: copy(copied, device), **{work.kernel: run for work, run in kernels}}, device)
    copy_rate = 2 * copied / timings[COPY].ms * 1e-6
    figures = []
    for work, _ in kernels:
        rate = work.bytes / timings[work.kernel].ms * 1e-6
        shares = {"gb_per_s": rate, "copy_gb_per_s": copy_rate, "share_of_copy": rate / copy_rate, "limit_ms": work.ms}
        figures.append((work.kernel, timings[work.kernel], shares))
    return figures


def _seconds(name: str) -> float:
    """A peer's; without us there is nothing to compare with, so we get what the clock has."""
    return float("inf") if name == OURS else CHECK_SECONDS


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
