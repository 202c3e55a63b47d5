"""``python -m ironmoe.bench.gpu``: test everything on this GPU, then measure it, within minutes that are given.

Needs torch, and Triton on a GPU; rich, transformers and the other peers are used only where they are installed. What was
measured is written after every layer, so an interruption loses one layer at most.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ironmoe.bench.gpu_measure import Case, Clock
from ironmoe.bench.gpu_report import GOAL_DEVICE, goals, markdown
from ironmoe.bench.peers import OURS, TOLERANCE
from ironmoe.bench.run_folder import write_atomically
from ironmoe.bench.shapes import FIRST_SHAPES, MAIN, REHEARSAL, ROUTINGS, SHAPES, Shape
from ironmoe.bench.suite import ROOT, TESTS, run_suite
from ironmoe.bench.timing import OutOfTime
from ironmoe.bench.tune import tune
from ironmoe.bench.versions import versions

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
TEST_SHARE, TUNE_SHARE = 0.4, 0.4  # of the minutes, at most
RESERVE = 10.0  # seconds kept back for the last files
UNEVEN = (MAIN.name, "vmoe-b16-e8", REHEARSAL[0].name)  # shapes measured under every routing; the others under a uniform one
PACKAGES = ("ironmoe", "torch", "triton", "numpy", "transformers", "liger-kernel", "moe-ops", "grouped-mm-bf16")


class OptionError(ValueError):
    """An option has a value that cannot be used; the message is one line and says which are."""


class Options(NamedTuple):
    """See ``parse``; ``out`` is a folder."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    minutes: float
    skip_tests: bool
    tune: bool
    out: Path


def make_options(
    device: str = "auto", dtype: str = "bfloat16", shapes: str | None = None, minutes: float = 9.0,
    skip_tests: bool = False, tune: bool = False, out: Path | None = None,
) -> Options:  # fmt: skip
    """Check what the command line gave. OptionError in one line if it cannot be done."""
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise OptionError("no GPU that torch can use; --device cpu rehearses the program on tiny shapes")
    if dtype not in DTYPES:
        raise OptionError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 < minutes < float("inf"):
        raise OptionError(f"--minutes must be a number above 0, got {minutes}")
    known = REHEARSAL if device == "cpu" else SHAPES
    return Options(
        torch.device("cpu" if device == "cpu" else "cuda"), DTYPES[dtype], select_shapes(shapes, known), minutes, skip_tests,
        tune, out or (ROOT if TESTS.is_dir() else Path.cwd()) / "bench" / "results",
    )  # fmt: skip


def select_shapes(names: str | None, known: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Those named, separated by commas; None is all of them."""
    by_name = {shape.name: shape for shape in known}
    wanted = list(by_name) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise OptionError(f"--shapes: {', '.join(map(repr, unknown))} not among {', '.join(by_name)}")
    return tuple(by_name[name] for name in wanted)


class Results:
    """The two files of a run. ``content`` is what the JSON one holds."""

    def __init__(self, options: Options) -> None:
        device = describe(options.device)
        name = device["name"]
        self.stem = options.out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{time.strftime('%Y-%m-%d-%H%M%S')}"
        self.content: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d %H:%M"), "device": device, "versions": installed(),
            "minutes": options.minutes, "finished": False, "why_not_finished": "", "tests": None, "goals": [], "rows": [],
            "notes": [], "tuning": {},
        }  # fmt: skip

    def write(self) -> None:
        """<gpu>-<date>.json and .md, whole or not at all."""
        is_goal_device = GOAL_DEVICE in self.content["device"]["name"]
        self.content["goals"] = [goal._asdict() for goal in goals(self.content["rows"])] if is_goal_device else []
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.stem.with_name(self.stem.name + ".json"), json.dumps(self.content, indent=1))
        write_atomically(self.stem.with_name(self.stem.name + ".md"), markdown(self.content))


def run_bench_gpu(options: Options, say: Callable[[str], None] = print) -> int:
    """Test, measure, tune, write. 0 if the tests passed, or were to be skipped, and we agree with the reference; else 1."""
    clock = Clock(60 * options.minutes - RESERVE)
    results = Results(options)
    content = results.content
    try:
        results.write()
        if not options.skip_tests:
            say("Tests on this device …")
            content["tests"] = run_suite(TEST_SHARE * 60 * options.minutes)
            say(f"  {content['tests']['outcome']} {content['tests']['counts'] or content['tests']['why']}")
            results.write()
        measuring = Clock(clock.left() - (TUNE_SHARE * 60 * options.minutes if options.tune else 0))
        _measure(options, measuring, results, say)
        if options.tune:
            _tune(options, clock, results, say)
        content["finished"] = not content["why_not_finished"]
    except (KeyboardInterrupt, RuntimeError) as error:
        content["why_not_finished"] = str(error) or "interrupted"
        raise
    finally:
        results.write()
        for goal in content["goals"]:
            verdict = {True: "met", False: "MISSED", None: "–"}[goal["met"]]
            say(f"{verdict:<6} {goal['text']}: {goal['measured']}")
        say(f"Wrote {results.stem}.json and .md" + (f"; not finished: {why}" if (why := content["why_not_finished"]) else ""))
    wrong = [note for note in content["notes"] if note["implementation"] == OURS and note["kind"] in ("disagrees", "failed")]
    for note in wrong:
        say(f"ironmoe at {note['shape']}, {note['routing']}: {note['why']}")
    tests = content["tests"]
    return int(bool(wrong) or (tests is not None and tests["outcome"] != "passed"))


def cases(shapes: tuple[Shape, ...]) -> list[tuple[Shape, str]]:
    """(shape, routing), most important first: the first shapes under a uniform routing, some under the others, the other shapes."""
    first = [(shape, "uniform") for shape in shapes if shape in FIRST_SHAPES]
    uneven = [(shape, routing) for shape in shapes if shape.name in UNEVEN for routing in ROUTINGS if routing != "uniform"]
    return first + uneven + [(shape, "uniform") for shape in shapes if shape not in FIRST_SHAPES]


def _measure(options: Options, clock: Clock, results: Results, say: Callable[[str], None]) -> None:
    content = results.content
    planned = cases(options.shapes)
    for i, (shape, routing) in enumerate(planned):
        if clock.left() <= 0:
            content["why_not_finished"] = f"no time for {', '.join(f'{s.name} {r}' for s, r in planned[i:])}"
            return
        start = time.monotonic()
        case = Case(shape, routing, options.dtype, options.device, clock)
        try:
            case.measure()
        finally:
            content["rows"] += case.rows
            content["notes"] += case.notes
            results.write()
        ours = {row["pass"]: row for row in case.rows if row["implementation"] == OURS and "tflops" in row}
        figures = ", ".join(f"{name} {row['ms']:.3f} ms ({row['tflops']:.0f} TFLOP/s)" for name, row in ours.items())
        say(f"{shape.name}, {routing}, in {time.monotonic() - start:.0f} s: {figures or 'nothing measured'}")
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def _tune(options: Options, clock: Clock, results: Results, say: Callable[[str], None]) -> None:
    tuning: dict[str, Any] = {"rows": [], "text": []}
    results.content["tuning"] = tuning
    shape = MAIN if options.device.type == "cuda" else REHEARSAL[0]
    try:
        for proposal in tune(options.dtype, options.device, clock.left, shape):
            say(proposal.text)
            row = proposal._asdict() | {"present": proposal.present._asdict(), "blocks": proposal.blocks._asdict()}
            tuning["rows"].append(row)
            tuning["text"].append(proposal.text)
            results.write()
    except OutOfTime:
        results.content["why_not_finished"] = "no time for all of the tuning"


def describe(device: torch.device) -> dict[str, Any]:
    """Name, and on a GPU memory, processors and driver."""
    if device.type == "cpu":
        return {"name": f"{platform.machine()} CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return {
        "name": properties.name, "memory_bytes": properties.total_memory, "processors": properties.multi_processor_count,
        "driver, clock, power": _output(command),
    }  # fmt: skip


def installed() -> dict[str, str]:
    """Versions of everything that can change a number and is installed; the commit where this is a checkout."""
    found = {name: version for name, version in versions(PACKAGES).items() if version != "not installed"}
    commit = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return found | {"cuda": str(torch.version.cuda)} | ({"commit": commit} if commit and TESTS.is_dir() else {})


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main(arguments: list[str] | None = None) -> int:
    """The command line. 2 for an option that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m ironmoe.bench.gpu", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, or cpu, which rehearses the program on tiny shapes")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--shapes", help="names separated by commas, by default all: " + ", ".join(s.name for s in SHAPES))
    parser.add_argument("--minutes", type=float, default=9.0, help="stop within these, with what there is")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--tune", action="store_true", help="also propose rows for the table of block sizes")
    parser.add_argument("--out", type=Path, help="folder of the results, by default bench/results")
    try:
        return run_bench_gpu(make_options(**vars(parser.parse_args(arguments))))
    except (OptionError, OSError) as error:
        print(f"ironmoe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
