"""The tests that use the device, as the benchmark runs them: with what is installed, within their
time, logged at once.
"""

import os
import subprocess
import sys

import pytest

from ironmoe.bench.benchmarks.gpu.run_log import RunLog
from ironmoe.bench.benchmarks.gpu.tasks import suite


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a tree of test files; gives (outcome, why) and the summary. One worker: what xdist does
    is tested once.
    """

    def run(seconds=60.0, workers=(), **files):
        folder = tmp_path / "tests" / "device"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (
                tmp_path / "tests" / "conftest.py" if name == "conftest" else folder / f"{name}.py"
            ).write_text(text)
        monkeypatch.setattr(suite, "_workers", lambda: list(workers))
        run_log = RunLog(tmp_path / "run.jsonl")
        return suite.run_suite(seconds, run_log, paths=("tests/device",)), suite.summary(
            run_log.entries()
        )

    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "TEST_FOLDER", tmp_path / "tests")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they would be most of the time
    return run


GOOD = """
import pytest

def test_a(): pass
def test_b(): assert 0, "wrong by 3"
@pytest.mark.skip(reason="no such chip")
def test_c(): pass
@pytest.mark.xfail(reason="known")
def test_d(): assert 0
"""


def test_what_runs_here_is_run_and_what_does_not_is_said(run):
    bad = "def test_a(): pass\nraise ValueError('in the file')\n"
    (outcome, why), found = run(
        test_good=GOOD, test_bad=bad, test_absent="import a_package_nobody_has\n"
    )
    assert (outcome, why) == ("failed", "")
    assert (
        found["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "xfailed": 1}
        and found["of"] == 4
    )
    failures = {failure["test"]: failure["why"] for failure in found["failures"]}
    assert failures.keys() == {"tests/device/test_bad.py", "tests/device/test_good.py::test_b"}
    assert "in the file" in failures["tests/device/test_bad.py"]
    assert "wrong by 3" in failures["tests/device/test_good.py::test_b"]
    assert found["not_run"] == [
        {"file": "tests/device/test_absent.py", "why": "needs a_package_nobody_has", "tests": 1},
        {"file": "tests/device/test_good.py", "why": "no such chip", "tests": 1},
    ]


def test_time_that_is_over_ends_the_tests_and_the_rest_goes_on_later(run):
    slow = (
        "import os, time\ndef test_a(): pass\ndef test_b():\n    if not "
        "os.path.exists('fast'): time.sleep(60)\ndef test_c(): pass\n"
    )
    (outcome, _), found = run(4.0, test_slow=slow)
    assert (
        outcome == "out of time"
        and found["counts"] == {"passed": 1, "running": 1}
        and found["failures"] == []
    )
    assert {row["why"]: row["tests"] for row in found["not_run"]} == {
        "no time": 1,
        "was running when the time was over": 1,
    }
    (suite.ROOT / "fast").touch()
    # which is not run again
    (outcome, _), found = run(
        test_slow=slow.replace("def test_a(): pass", "def test_a(): assert 0")
    )
    assert outcome == "passed" and found["counts"] == {"passed": 3} and found["not_run"] == []


DEADLY = """
import ctypes, os, pytest, time

def test_a(): pass
def test_hangs():
    ctypes.CDLL(None).sleep(60) and None
    time.sleep(60)
def test_b(): pass
def test_dies(): os._exit(7)
def test_c(): pass
def test_breaks_the_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_d(): pass
"""


@pytest.mark.parametrize(
    "workers",
    [(), ("-p", "xdist.plugin", "-n", "1", "--dist", "worksteal")],
    ids=["alone", "xdist"],
)
def test_a_test_that_hangs_dies_or_breaks_the_device_costs_one_test(run, monkeypatch, workers):
    if workers:
        pytest.importorskip("xdist")
    monkeypatch.setenv("IRONMOE_TEST_SECONDS", "1.5")
    (outcome, _), found = run(workers=workers, test_deadly=DEADLY)
    failed = {failure["test"].split("::")[1] for failure in found["failures"]}
    assert outcome == "failed" and failed == {"test_hangs", "test_dies", "test_breaks_the_device"}
    assert found["counts"] == {"passed": 4, "failed": 3}


def test_a_suite_that_cannot_start_says_why(run):
    (outcome, why), found = run(
        conftest="import a_package_nobody_has\n", test_good="def test_a(): pass\n"
    )
    assert (outcome, why) == (
        "not run",
        "tests/conftest.py needs a_package_nobody_has",
    ) and found is None


WITHOUT = """
import sys
from importlib.machinery import PathFinder

blocked = {"hypothesis", "transformers", "rich", "typer", "mlxtend", "matplotlib", "sklearn",
           "timm"}
find = PathFinder.find_spec

class Find:
    def __call__(self, name, *rest):
        return None if name.split(".")[0] in blocked else find(name, *rest)

PathFinder.find_spec = Find()

import pytest
sys.exit(pytest.main([*sys.argv[1:], "-rs", "-p", "no:cacheprovider"]))
"""


def test_the_device_tests_run_on_a_bare_machine():
    """All files are read; tests that need hypothesis are skipped one by one, not with their
    files."""
    command = [sys.executable, "-c", WITHOUT, *suite.DEVICE_TESTS, "-k", "any_shape"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=suite.ROOT, env=environment)
    said = run.stdout[-3000:] + run.stderr[-2000:]
    assert run.returncode == 0 and "needs hypothesis" in said and "error" not in said, said
    assert int(said.split(" deselected")[0].split(" ")[-1]) > 400
