"""What a GPU does during a measurement: the time of each kernel (torch's profiler), of compiling
(Triton), its clock and power (nvidia-smi)."""

import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not in __all__
from torch.profiler import ProfilerActivity, profile

QUERY = "clocks.sm,power.draw,temperature.gpu"
EVERY = 0.3  # seconds; each reading is a process of its own, which takes some hundredths
CALLS = 5
LONGEST_NAME = 60  # torch's own kernels have names of hundreds of letters, which are cut


class KernelTime(NamedTuple):
    """One launch within a call. number: it is the so-many-th of its kernel; us: microseconds,
    median over the calls; share: of the time of all kernels of the call."""

    kernel: str
    number: int
    us: float
    share: float


def kernel_times(run: Callable[[], Any], device: torch.device) -> list[KernelTime]:
    """Every launch of a call, in order. The list is empty where the profiler sees no kernels: on
    CPU, or where counters may not be read."""
    if device.type != "cuda":
        return []
    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize(device)
    return launches_of(profiler.events() or [], CALLS)


def launches_of(events: Any, calls: int) -> list[KernelTime]:
    """The launches in the profiler's events. A kernel that does not run equally often in each call
    is averaged over all its runs, as number 0."""
    kernels = [
        e
        for e in events
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
    kernels.sort(key=lambda event: event.time_range.start)
    times: dict[str, list[float]] = defaultdict(list)  # in the order of each kernel's first run

    for event in kernels:
        times[event.name[:LONGEST_NAME]].append(event.time_range.elapsed_us())

    total = sum(map(sum, times.values())) or 1.0
    found = []
    for name, taken in times.items():
        a_call, rest = divmod(len(taken), calls)
        groups = {0: taken} if rest else {i + 1: taken[i::a_call] for i in range(a_call)}
        found += [
            KernelTime(name, number, median(group), sum(group) / total)
            for number, group in groups.items()
        ]

    return found


class Compiled(NamedTuple):
    """kernels: how many were compiled, and in how many seconds; from_cache: how many Triton's cache
    had instead; longest: which took longest."""

    kernels: int
    seconds: float
    from_cache: int
    longest: str


class CompileTimes:
    """Counts what Triton compiles, which calls it for every kernel. Times come in microseconds."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, str]] = []
        self.from_cache = 0

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.from_cache += 1
        else:
            self.seconds.append((times.total * 1e-6, str(getattr(src, "name", "?"))))

    def summary(self) -> list[dict[str, Any]]:
        """A list of one row; empty if nothing was compiled or found."""
        if not self.seconds and not self.from_cache:
            return []
        seconds, name = max(self.seconds, default=(0.0, ""))
        longest = f"{name}, {seconds:.1f} s" if name else ""
        return [
            Compiled(
                len(self.seconds), sum(s for s, _ in self.seconds), self.from_cache, longest
            )._asdict()
        ]


@contextmanager
def listening() -> Iterator[CompileTimes]:
    """Inside the block, count all that Triton compiles in this process. Without Triton there is
    nothing to count."""
    listener = CompileTimes()
    if find_spec("triton") is None:
        yield listener
        return
    from triton import knobs

    before, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        yield listener
    finally:
        knobs.compilation.listener = before


class Reading(NamedTuple):
    """when: by ``time.monotonic``; the clock of the processors in MHz; watts; degrees Celsius."""

    when: float
    sm_mhz: float
    watts: float
    celsius: float


class GpuMonitor:
    """Reads clock, power and temperature in a thread while the block runs.

    Without nvidia-smi, or where it gives no numbers, there are no readings.
    """

    def __init__(self, gpu: str | None = None) -> None:
        """``gpu``: its UUID; None where there is none."""
        self.readings: list[Reading] = []
        self._command = [
            shutil.which("nvidia-smi") or "",
            f"--query-gpu={QUERY}",
            "--format=csv,noheader,nounits",
            f"--id={gpu}",
        ]
        self._over = threading.Event()
        self._thread = (
            threading.Thread(target=self._read, daemon=True) if gpu and self._command[0] else None
        )

    def __enter__(self) -> "GpuMonitor":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(5)

    def since(self, when: float) -> dict[str, float]:
        """The medians since a moment of ``time.monotonic``, by name. Empty if nothing was read
        since."""
        found = [reading for reading in self.readings if reading.when >= when]
        names = Reading._fields[1:] if found else ()
        return {name: median(getattr(reading, name) for reading in found) for name in names}

    def _read(self) -> None:
        while not self._over.wait(EVERY):
            try:
                output = subprocess.run(
                    self._command, capture_output=True, text=True, timeout=5
                ).stdout
                sm_mhz, watts, celsius = map(float, output.strip().split(","))
            except (OSError, ValueError, subprocess.TimeoutExpired):
                continue  # "[N/A]" under MIG, say
            self.readings.append(Reading(time.monotonic(), sm_mhz, watts, celsius))
