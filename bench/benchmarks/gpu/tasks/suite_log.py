"""A pytest plugin that logs each test to a run log at once, goes on where the log ends, and keeps
one test from spoiling the others.

``pytest -p ironmoe.bench.benchmarks.gpu.tasks.suite_log`` with the run log's path in
``IRONMOE_TEST_LOG``. Under xdist the controller writes.

A test that hangs ends its process after TEST_SECONDS, and so does one that leaves the GPU in a
state in which nothing runs any more; xdist starts another worker, and ``suite.py`` another pytest.
"""

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ironmoe.bench.benchmarks.gpu.run_log import BROKEN_DEVICE, RunLog, end_with_parent
from ironmoe.bench.benchmarks.gpu.tasks.suite import LOG, outcomes_of_tests

TEST_SECONDS = float(os.environ.get("IRONMOE_TEST_SECONDS", "150"))
MESSAGE = 400  # letters of a failure or a reason

_in_worker = "PYTEST_XDIST_WORKER" in os.environ
_run_log = RunLog(Path(os.environ[LOG])) if LOG in os.environ else None
_broken = False
_done: frozenset[str] = frozenset()


def pytest_configure(config: pytest.Config) -> None:
    """Find out what is done already. All workers have to collect the same tests, later ones too, so
    this is asked before anything starts."""
    global _done
    if _run_log and not _in_worker:
        end_with_parent()
    if _in_worker:
        _done = frozenset(config.workerinput["done"])  # type: ignore[attr-defined]
    elif _run_log:
        found = outcomes_of_tests(_run_log.entries())
        _done = frozenset(name for name, entry in found.items() if entry["outcome"] != "running")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["done"] = sorted(_done)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are done."""
    gone = [item for item in items if item.nodeid in _done]
    items[:] = [item for item in items if item.nodeid not in _done]
    config.hook.pytest_deselected(items=gone)


def pytest_collection_finish(session: pytest.Session) -> None:
    if _run_log and not _in_worker and session.items:
        _run_log.write(
            "collected",
            count=len(session.items),
            files=_files(item.nodeid for item in session.items),
        )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if _run_log and not _in_worker and report.failed:
        _run_log.write(
            "test",
            test=report.nodeid,
            outcome="failed",
            seconds=0.0,
            why=report.longreprtext[-MESSAGE:],
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    if _run_log and node.gateway.id == "gw0":
        _run_log.write("collected", count=len(ids), files=_files(ids))


def _files(ids: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in ids:
        file = name.split("::")[0]
        counts[file] = counts.get(file, 0) + 1
    return counts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process of a test that hangs. The watch is a thread of C, which a kernel that never
    ends cannot hold up."""
    faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=sys.__stderr__ or 2)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if _broken:  # its reports have been sent
            os._exit(1)


def pytest_runtest_logstart(nodeid: str) -> None:
    if _run_log and not _in_worker:
        _run_log.write("test", test=nodeid, outcome="running", seconds=0.0, why="")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _broken
    why = _why(report)
    _broken = _broken or (
        report.failed and any(sign in report.longreprtext for sign in BROKEN_DEVICE)
    )
    if _run_log and not _in_worker and (report.when == "call" or not report.passed):
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        _run_log.write(
            "test", test=report.nodeid, outcome=outcome, seconds=round(report.duration, 3), why=why
        )


def _why(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")[:MESSAGE]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext if report.failed else "")[:MESSAGE]
