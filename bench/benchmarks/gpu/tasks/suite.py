"""Run the tests that use the device, in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ironmoe.bench.benchmarks.gpu.run_log import Entry, RunLog

ROOT = Path(__file__).resolve().parents[4]
TEST_FOLDER = ROOT / "tests"
# Only these compute on the device; the other tests compute on the CPU.
DEVICE_TESTS = ("tests/device", "tests/kernels/test_operators.py", "tests/kernels/gpu")
# tests/conftest.py has stand-ins for these packages: without them single tests are skipped, not
# whole files.
STAND_INS = ("hypothesis",)
WORKERS = 12  # most of the time goes into compiling, and a GPU holds so many processes
STARTS = 4  # of pytest, after a test that ended its process
LOG = "IRONMOE_TEST_LOG"  # in the environment: the run log that suite_log.py writes to
RANK = {"running": 0, "passed": 1, "xfailed": 1, "skipped": 2, "failed": 3}
WATCH_SECONDS = 0.5  # between two calls of watch
CANNOT_RUN = (3, 4)  # exit status of pytest: an internal error, a wrong option
IMPORT = re.compile(r"^(?:from|import)\s+(\w+)", re.MULTILINE)


def run_suite(
    seconds: float,
    run_log: RunLog,
    watch: Callable[[], None] = lambda: None,
    paths: tuple[str, ...] = DEVICE_TESTS,
) -> tuple[str, str]:
    """Run the tests that have no outcome in ``run_log``. Each outcome is in the run log at once.

    Args:
        seconds: that the tests may take.
        watch: called about twice a second meanwhile.
        paths: of the tests.

    Returns:
        ("passed", "failed", "out of time" or "not run", and why)
    """
    if not TEST_FOLDER.is_dir():
        return "not run", f"no tests beside {Path(__file__).parent}"
    if find_spec("pytest") is None:
        return "not run", "pytest is not installed"
    left_out = _left_out(paths)
    needed_by_all = [
        f"{name} needs {', '.join(missing)}"
        for name, missing in left_out.items()
        if name.endswith("conftest.py")
    ]
    if needed_by_all:
        return "not run", "; ".join(needed_by_all)

    run_log.write("left out", files=left_out)
    command = _command(paths, left_out)
    end = time.monotonic() + seconds

    for _ in range(STARTS):
        returncode, output = _run(command, end - time.monotonic(), run_log, watch)
        if returncode is None:
            return "out of time", f"{seconds:.0f} s were over"
        anything_died = _fail_those_running(run_log)
        if not anything_died and (_ended(output) or returncode in CANNOT_RUN):
            break

    return _outcome(returncode, output, run_log)


def _left_out(paths: tuple[str, ...]) -> dict[str, list[str]]:
    """Files that cannot be run here, and the packages they miss."""
    return {
        str(file.relative_to(ROOT)): missing
        for file in _files(paths)
        if (missing := _missing(file))
    }


def _command(paths: tuple[str, ...], left_out: Iterable[str]) -> list[str]:
    """How pytest is started."""
    plugins = ["-p", "ironmoe.bench.benchmarks.gpu.tasks.suite_log", "-p", "no:cacheprovider"]
    ignored = [f"--ignore={name}" for name in left_out]
    return [
        *(sys.executable, "-m", "pytest"),
        *paths,
        *plugins,
        "--continue-on-collection-errors",
        *ignored,
        *_workers(),
    ]


def _fail_those_running(run_log: RunLog) -> bool:
    """Note that the tests failed that were running when pytest ended; True if there are any."""
    found = outcomes_of_tests(run_log.entries())
    running = [name for name, test in found.items() if test["outcome"] == "running"]
    for name in running:
        why = "its process died or hung"
        run_log.write("test", test=name, outcome="failed", seconds=0.0, why=why)
    return bool(running)


def _outcome(returncode: int | None, output: str, run_log: RunLog) -> tuple[str, str]:
    """("passed" or "failed", and why) after the last pytest."""
    found = outcomes_of_tests(run_log.entries())
    failed = any(test["outcome"] == "failed" for test in found.values())
    if returncode in (0, 5) and not failed:  # 5: none was left to run
        return "passed", ""
    last = output.strip().splitlines()[-1:] or [""]
    return "failed", "" if failed else f"pytest: exit status {returncode}: {last[0]}"


def summary(entries: list[Entry]) -> dict[str, Any] | None:
    """A summary of the tests for the report; None before there are tests.

    counts: tests by outcome; not_run: how many by (file, reason); failures: what failed and why;
    longest: the seconds of the longest.
    """
    tests = outcomes_of_tests(entries)
    left_out = next(
        (entry["files"] for entry in reversed(entries) if entry["kind"] == "left out"), None
    )
    if left_out is None:
        return None
    collected = [entry for entry in entries if entry["kind"] == "collected"]
    counts = Counter(test["outcome"] for test in tests.values())
    not_run: Counter[tuple[str, str]] = Counter()

    for name, test in tests.items():
        if test["outcome"] in ("skipped", "running"):
            not_run[name.split("::")[0], test["why"] or "was running when the time was over"] += 1

    begun = Counter(name.split("::")[0] for name in tests)
    for file, count in (collected[0]["files"] if collected else {}).items():
        if count > begun[file]:
            not_run[file, "no time"] += count - begun[file]

    for file, missing in left_out.items():
        not_run[file, f"needs {', '.join(missing)}"] += 1

    return {
        "counts": dict(counts),
        "of": collected[0]["count"] if collected else 0,
        "not_run": [
            {"file": file, "why": why, "tests": count}
            for (file, why), count in sorted(not_run.items())
        ],
        "failures": [
            {"test": name, "why": test["why"]}
            for name, test in tests.items()
            if test["outcome"] == "failed"
        ],
        "longest": [
            {"test": name, "seconds": test["seconds"]}
            for name, test in sorted(tests.items(), key=lambda t: -t[1]["seconds"])[:3]
        ],
    }


def outcomes_of_tests(entries: list[Entry]) -> dict[str, Entry]:
    """The outcome of every test, by its id: the worst one where setup, call and teardown differ.

    A test that has begun and not ended is "running".
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry["kind"] == "test":
            name = entry["test"]
            if name not in found or RANK[entry["outcome"]] > RANK[found[name]["outcome"]]:
                found[name] = entry
    return found


def _workers() -> list[str]:
    workers = min(WORKERS, os.cpu_count() or 1)
    return (
        ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "30"]
        if find_spec("xdist") and workers > 1
        else []
    )


def _ended(output: str) -> bool:
    """Whether pytest came to its end, where it says how long it took."""
    return bool(re.search(r" in [\d.]+s", output))


def _run(
    command: list[str], seconds: float, run_log: RunLog, watch: Callable[[], None]
) -> tuple[int | None, str]:
    """Run the command. Whatever the tests have started ends with it.

    Returns:
        (exit status, or None if it took too long; output)
    """
    # The caller may be a worker of another pytest: with its variables this one would be a worker.
    outside = {name: value for name, value in os.environ.items() if "PYTEST_XDIST" not in name}
    # With more threads the float64 twins of a dozen processes would only wait for each other.
    environment = outside | {LOG: str(run_log.path.resolve()), "OMP_NUM_THREADS": "1"}
    output_file = run_log.path.with_suffix(".pytest.txt")
    end = time.monotonic() + seconds

    with open(output_file, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < end:
                watch()
                time.sleep(WATCH_SECONDS)
        finally:
            returncode = process.poll()
            if returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    watch()
    text = output_file.read_text(errors="replace")
    output_file.unlink()
    return returncode, text


def _files(paths: tuple[str, ...]) -> list[Path]:
    """The test files of these paths, and what pytest loads for them."""
    found = [TEST_FOLDER / "conftest.py"] if (TEST_FOLDER / "conftest.py").is_file() else []
    for path in paths:
        place = ROOT / path
        found += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return found


def _missing(file: Path) -> list[str]:
    """Packages that a test file imports at its top and that are not installed. Files beside it
    count as installed."""
    names = sorted(set(IMPORT.findall(file.read_text())) - set(STAND_INS))
    return [
        name
        for name in names
        if not (file.parent / f"{name}.py").is_file() and find_spec(name) is None
    ]
