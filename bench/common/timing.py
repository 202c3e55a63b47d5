"""The one timer: everything that is compared runs in turns, in a new random order each round."""

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

WARMUP = 2
MIN_ROUNDS = 3
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
CYCLES_A_SECOND = 2_000_000_000  # about a GPU's clock
LONGEST_LEAD = 0.02  # seconds that the device waits for the host at most


class Sample(NamedTuple):
    """Milliseconds of one call: the device's, and those until the call returned on the host."""

    ms: float
    host_ms: float


class Timing(NamedTuple):
    """Many samples. ms, host_ms: their medians; p20, p80: percentiles of ``ms``; runs: how many."""

    ms: float
    p20: float
    p80: float
    runs: int
    host_ms: float


class Countdown:
    """Counts down the seconds that a piece of work was given."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class OutOfTime(Exception):
    """The seconds that a piece of work was given are over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when its seconds are over, even in the middle of a compilation.
    Main thread, POSIX only."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    if seconds <= 0:
        raise OutOfTime
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 20,
    seconds: float = 2.0,
) -> dict[str, Timing]:
    """Time each of ``runs`` in turns: see ``samples_in_turns``, which has the same arguments."""
    samples = samples_in_turns(runs, device, rounds, seconds)
    return {name: _summary(found) for name, found in samples.items()}


def samples_in_turns(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 20,
    seconds: float = float("inf"),
    *,
    warmup: int | None = None,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[Sample]]:
    """Time each of ``runs``, A B C, B A C, … in a new random order each round.

    So a machine that becomes slower does so for all, and no call always follows the same other one
    and finds its data in the caches. On a GPU the L2 cache is overwritten before each call, and the
    device first waits while the host runs ahead. So the time of launches is not in ``ms``, but in
    ``host_ms``, unless the call itself waits for the device.

    Args:
        runs: by name, each without arguments.
        rounds: how many rounds there are at most.
        seconds: after these no new round begins, once there were MIN_ROUNDS.
        warmup: calls of each before the first round, WARMUP by default. Without any, the device
            does not wait for the host.
        on_round: called after each round.
    """
    once = _timer(device)
    leads = dict.fromkeys(runs, 0.0)
    for name, run in runs.items():
        for _ in range(WARMUP if warmup is None else warmup):
            leads[name] = once(run, 0.0).host_ms / 1e3

    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in random.sample(list(runs), len(runs)):
            samples[name].append(once(runs[name], leads[name]))
        on_round()

    return samples


def _timer(device: torch.device) -> Callable[[Callable[[], Any], float], Sample]:
    """A function that times one call: (the call, seconds that the device waits first) → Sample."""
    if device.type != "cuda":

        def on_cpu(run: Callable[[], Any], lead: float) -> Sample:
            start = time.perf_counter()
            run()
            ms = 1e3 * (time.perf_counter() - start)
            return Sample(ms, ms)

        return on_cpu

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_gpu(run: Callable[[], Any], lead: float) -> Sample:
        flush.zero_()
        torch.cuda._sleep(int(min(lead, LONGEST_LEAD) * CYCLES_A_SECOND))
        begin.record()
        start = time.perf_counter()
        run()
        host_ms = 1e3 * (time.perf_counter() - start)
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end), host_ms)

    return on_gpu


def _summary(samples: list[Sample]) -> Timing:
    ms = [sample.ms for sample in samples]
    p20, _, _, p80 = quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    host_ms = median(sample.host_ms for sample in samples)
    return Timing(median(ms), p20, p80, len(samples), host_ms)


def square_product(size: int, device: torch.device) -> Callable[[], Any]:
    """A call that multiplies two bf16 matrices of ``size`` × ``size``, 2 · size³ FLOPs: it shows
    what the machine can do at the moment."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def copy(num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """A call that copies ``num_bytes`` bytes; twice as many move."""
    source = torch.zeros(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
