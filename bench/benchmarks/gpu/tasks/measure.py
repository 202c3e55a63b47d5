"""Measure one layer under one routing: check how far each implementation is from the reference,
then time them beside each other.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from ironmoe.bench.benchmarks.gpu.run_log import (
    BROKEN_DEVICE,
    LONGEST_REASON,
    Pen,
    Row,
    first_line,
)
from ironmoe.bench.benchmarks.gpu.tasks.entrants import Entrant, Place, Prepared, prepare
from ironmoe.bench.benchmarks.gpu.tasks.movers import time_movers
from ironmoe.bench.benchmarks.gpu.tasks.observe import GpuMonitor, kernel_times
from ironmoe.bench.benchmarks.passes import FULL, INFERENCE, PASSES, PGD
from ironmoe.bench.benchmarks.peers import DENSE, IRONMOE, OURS, PEERS, dense
from ironmoe.bench.benchmarks.reference import disagreement, errors, reference
from ironmoe.bench.benchmarks.roofline import limit_ms, needed_flops
from ironmoe.bench.benchmarks.shapes import Problem, dense_problem, make_problem
from ironmoe.bench.common.timing import (
    Countdown,
    OutOfTime,
    Timing,
    interleaved,
    square_product,
    time_limit,
)

CHECK_SECONDS = 45.0  # for a peer to compile, tune itself and be checked
PRODUCT = "product"
PRODUCT_SIZE = {"cuda": 8192, "cpu": 256}
# The parts of the work beside the passes.
CHECK = "check"
MOVERS = "kernels that move rows"
PROFILE = "kernels in a pass"

T = TypeVar("T")


class LayerCase:
    """Measures one layer under one routing. Every pass is in the run log when it is finished; notes
    say who was not measured and why."""

    def __init__(
        self,
        place: Place,
        countdown: Countdown,
        pen: Pen,
        *,
        rounds: int = 20,
        without: Sequence[str] = (),
    ) -> None:
        """``without``: peers that are left out, because an earlier process died of them."""
        self.place = place
        self.countdown = countdown
        self.pen = pen
        self.rounds = rounds
        self.without = without
        self.rows: list[Row] = []
        self.notes: list[dict[str, str]] = []

    def measure(self, monitor: GpuMonitor) -> bool:
        """Measure what ``pen`` has not got yet, until the countdown ends. A peer that fails loses
        its own rows only.

        Returns:
            True if nothing is left to do.

        Raises:
            RuntimeError: the device is in a state in which nothing runs any more.
        """
        passes = [name for name in PASSES if name != PGD or self.place.device.type == "cuda"]
        missing = [part for part in (*passes, MOVERS, PROFILE) if part not in self.pen.done]
        try:
            for part in self._ready(missing, monitor):
                if self.countdown.left() <= 0:
                    return False
                part()
        finally:
            if self.notes:
                self._flush("notes")
        return self.countdown.left() > 0 or all(part in self.pen.done for part in missing)

    def _ready(self, missing: list[str], monitor: GpuMonitor) -> list[Callable[[], None]]:
        """The missing parts as calls, with everything that they need. The list is empty if our own
        layer cannot be run here."""
        if not missing:
            return []
        place = self.place
        make = partial(make_problem, place.shape, place.routing, place.dtype, place.device)
        problem = self._attempt("all", make)
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
            others[part] if part in others else partial(self._measure_pass, part, entrants, monitor)
            for part in missing
        ]

    def _check(self, problem: Problem) -> dict[str, Entrant]:
        """All implementations that can do the problem, also those whose results are wrong: the
        report says so beside their times."""
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
            check = partial(errors, peer.build, problem, correct)
            found = self._attempt(name, check, _seconds(name))
            if found is None:
                continue

            if why := disagreement(found, self.place.dtype):
                self._note(name, "disagrees", why)
            worst = max(found.values(), key=lambda error: error if error == error else float("inf"))
            entrants[name] = Entrant(peer.build, problem, worst, why, peer.captures)

        self._flush(CHECK)
        return entrants

    def _measure_pass(
        self, pass_name: str, entrants: dict[str, Entrant], monitor: GpuMonitor
    ) -> None:
        """Time one pass of every entrant beside a large matrix product."""
        prepared = self._prepare_all(pass_name, entrants)
        size = PRODUCT_SIZE[self.place.device.type]
        runs = {
            PRODUCT: square_product(size, self.place.device),
            **{name: ready.run for name, ready in prepared.items()},
        }

        start = time.monotonic()
        timing = partial(interleaved, runs, self.place.device, self.rounds)
        timings = self._attempt("all", timing, part=pass_name)
        if timings is None or OURS not in prepared:
            return

        product_tflops = 2 * size**3 / timings[PRODUCT].ms * 1e-9
        for name, ready in prepared.items():
            figures = self._speed(pass_name, timings[name], product_tflops)
            figures |= ready.memory
            figures |= entrants[name].agreement(self.place.dtype)
            figures |= monitor.since(start)
            self._add(name, pass_name, timings[name], figures)

        self._flush(pass_name)

    def _prepare_all(self, pass_name: str, entrants: dict[str, Entrant]) -> dict[str, Prepared]:
        """One pass of every implementation that can do it."""
        prepared = {}
        for name, entrant in entrants.items():
            if pass_name == PGD and not entrant.captures:
                continue
            work = partial(prepare, pass_name, entrant)
            ready = self._attempt(name, work, _seconds(name), part=pass_name)
            if ready is not None:
                prepared[name] = ready
        return prepared

    def _speed(self, pass_name: str, timing: Timing, product_tflops: float) -> Row:
        """The fields of a row that compare with the product, and with the roofline, which knows
        16-bit dtypes only."""
        shape = self.place.shape
        tflops = needed_flops(shape, pass_name) / timing.ms * 1e-9
        return {
            "tflops": tflops,
            "share_of_product": tflops / product_tflops,
            "product_tflops": product_tflops,
            "limit_ms": limit_ms(shape, pass_name) if self.place.dtype.itemsize == 2 else None,
        }

    def _measure_movers(self, problem: Problem) -> None:
        """Time the kernels that move rows."""
        timed = self._attempt(OURS, partial(time_movers, problem, self.rounds), part=MOVERS)
        for mover in timed or ():
            self._add(OURS, f"kernel {mover.kernel}", mover.timing, mover.figures)
        self._flush(MOVERS)

    def _profile(self, ours: Entrant) -> None:
        """The time of every kernel by itself, in the passes of inference and training."""
        found: list[Row] = []
        for pass_name in (INFERENCE, FULL):
            run = PASSES[pass_name](ours.build, ours.problem)
            times = partial(kernel_times, run, self.place.device)
            launches = self._attempt(OURS, times, part=PROFILE)
            if launches == []:
                self._note(OURS, "absent", "the profiler gives no kernel times here")
            found += [
                {**self.place.as_row(), "pass": pass_name, **launch._asdict()}
                for launch in launches or ()
            ]
        self._flush(PROFILE, kernels=found)

    def _flush(self, part: str, **other: list[Row]) -> None:
        """Write what there is to the run log: the part is finished."""
        self.pen.finish(part, rows=self.rows, notes=self.notes, **other)
        self.rows, self.notes = [], []

    def _add(self, name: str, pass_name: str, timing: Timing, figures: Row) -> None:
        """Add a row, which the next ``_flush`` writes."""
        shape = self.place.shape
        row = {
            "implementation": name,
            "pass": pass_name,
            "sizes": shape.sizes,
            "activation": shape.activation,
            "bias": shape.bias,
        }
        self.rows.append(row | self.place.as_row() | timing._asdict() | figures)

    def _note(self, name: str, kind: str, why: str) -> None:
        """Add a note. kind: absent, disagrees, failed, or no time."""
        place = self.place.as_row()
        self.notes.append({"implementation": name, **place, "kind": kind, "why": why})

    def _attempt(
        self,
        name: str,
        work: Callable[[], T],
        seconds: float = float("inf"),
        *,
        part: str = CHECK,
    ) -> T | None:
        """The result of ``work``; None, and a note, if it fails or takes longer than its seconds or
        the countdown allows.

        Raises:
            RuntimeError: it broke the device.
        """
        seconds = min(seconds, self.countdown.left())
        self.pen.begin(part, name)
        try:
            with time_limit(seconds):
                return work()
        except OutOfTime:
            self._note(name, "no time", f"{part}: took longer than {max(seconds, 0):.0f} s")
        except Exception as error:  # a peer may raise anything; a note says what
            self._note(name, "failed", f"{part}: {first_line(error)}"[:LONGEST_REASON])
            if any(sign in str(error) for sign in BROKEN_DEVICE):
                self._flush(f"{part} of {name}")
                raise RuntimeError(
                    f"{name} broke the device at {self.place.shape.name}, {part}: {error}"
                ) from error

        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _seconds(name: str) -> float:
    """The seconds that an implementation may take to get ready. Ours has all that are left, because
    without it there is nothing to compare with."""
    return float("inf") if name == OURS else CHECK_SECONDS
