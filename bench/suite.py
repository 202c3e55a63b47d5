"""The test suite in a process of its own, on the device of this machine, with what is installed here."""

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
FOLDERS = ("tests/kernels", "tests/moe", "tests/attacks", "tests")  # what a time limit cuts off is the least important
IMPORT = re.compile(r"^(?:from|import)\s+(\w+)", re.MULTILINE)
SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)")


def run_suite(seconds: float) -> dict[str, Any]:
    """Run ``tests/`` for so many seconds at most.

    Returns:
        outcome: "passed", "failed", "out of time" or "not run"; why; counts by word; left_out: test files whose imports are not
        installed here, with what they lack; failures: the lines pytest ends with; output: the last lines.
    """
    left_out = {str(file.relative_to(ROOT)): missing for file in sorted(TESTS.rglob("*.py")) if (missing := _missing(file))}
    result: dict[str, Any] = {"outcome": "not run", "why": "", "counts": {}, "left_out": left_out, "failures": [], "output": []}
    needed_by_all = {name: missing for name, missing in left_out.items() if name.endswith("conftest.py")}
    if not TESTS.is_dir():
        return result | {"why": f"no tests beside {Path(__file__).parent}"}
    if find_spec("pytest") is None:
        return result | {"why": "pytest is not installed"}
    if needed_by_all:
        return result | {"why": "; ".join(f"{name} needs {', '.join(missing)}" for name, missing in needed_by_all.items())}
    command = [sys.executable, "-m", "pytest", *FOLDERS, "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += [f"--ignore={name}" for name in left_out]
    returncode, output = _run(command, seconds)
    lines = output.splitlines()
    return result | {
        "outcome": {0: "passed", None: "out of time"}.get(returncode, "failed"),
        "counts": {word: int(count) for count, word in SUMMARY.findall(lines[-1])} if lines else {},
        "failures": [line for line in lines if line.startswith(("FAILED ", "ERROR "))],
        "output": lines[-40:],
    }


def _run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit status, or None if it took too long; output). Whatever the tests started ends with them."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, output
        raise


def _missing(file: Path) -> list[str]:
    """Packages that a test file imports at its top and that are not installed; its neighbours in the folder count as installed."""
    names = sorted(set(IMPORT.findall(file.read_text())))
    return [name for name in names if not (file.parent / f"{name}.py").is_file() and find_spec(name) is None]
