"""The files of a run on a GPU, <gpu>-<date>.json and .md. They are made from its run log, which
stays until everything is done."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from ironmoe.attacks.evaluation.describe import differences
from ironmoe.bench.benchmarks.gpu.markdown import markdown
from ironmoe.bench.benchmarks.gpu.report import GOAL_DEVICES, goals
from ironmoe.bench.benchmarks.gpu.run_log import Entry, RunLog, outcomes, tables
from ironmoe.bench.benchmarks.gpu.tasks.suite import ROOT, TEST_FOLDER, summary
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.files import slug, write_atomically, write_json
from ironmoe.bench.common.machine.provenance import code_digest, provenance
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.user_error import UserError

RUN_LOG = ".jsonl"
HEAD = ("date", "device", "versions", "dtype", "minutes")  # of the run log's first entry
PACKAGES = (
    "ironmoe",
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger-kernel",
    "moe-ops",
    "grouped-mm-bf16",
)


class ResultsError(UserError):
    """There is no run to go on with, or it was another run; the message is one line."""


class Results:
    """The two files and the run log of one run. stem: their path without its suffix."""

    def __init__(
        self, out: Path, device: torch.device, dtype: torch.dtype, minutes: float, resume: bool
    ) -> None:
        """Begin a run, or go on with the newest one in ``out`` that is not finished.

        Raises:
            ResultsError: there is none, or it was measured on another device, with other versions,
            or in another dtype.
        """
        self.device = describe(device)
        settings = {
            "device": self.device,
            "versions": installed(),
            "dtype": dtype_name(dtype),
            "code": code_digest(),
        }
        if resume:
            self.run_log, self.head = _interrupted(out, json.loads(json.dumps(settings)))
        else:
            _make(out)
            name = slug(self.device["name"])
            self.run_log = RunLog(out / f"{name}-{time.strftime('%Y-%m-%d-%H%M%S')}{RUN_LOG}")
            self.run_log.write(
                "run",
                date=time.strftime("%Y-%m-%d %H:%M"),
                minutes=minutes,
                made=provenance(),
                **settings,
            )
            self.head = self.run_log.entries()[0]

        self.stem = self.run_log.path.with_suffix("")
        self._missing: list[str] = []

    def write(self, missing: list[str] | None = None, why: str = "") -> dict[str, Any]:
        """Write both files, each whole or not at all, and return the content.

        missing: the jobs that are not done, by default those of the last call; why: why the run has
        ended early.
        """
        self._missing = self._missing if missing is None else missing
        content = self._content(why)
        write_json(self.stem.with_name(self.stem.name + ".json"), content)
        write_atomically(self.stem.with_name(self.stem.name + ".md"), markdown(content))
        return content

    def finish(self, jobs: list[str], why: str) -> dict[str, Any]:
        """Write the files for the last time. The run log is removed if nothing is left to do."""
        done = {
            name
            for name, end in outcomes(self.run_log.entries()).items()
            if end["outcome"] != "out of time"
        }
        missing = [name for name in jobs if name not in done]
        no_time = f"no time for all of {', '.join(missing)}" if missing else ""
        content = self.write(missing, "; ".join(part for part in (why, no_time) if part))
        if content["finished"]:
            self.run_log.path.unlink()
        return content

    def _content(self, why: str) -> dict[str, Any]:
        entries = self.run_log.entries()
        found = tables(entries)
        # A part that was begun twice has its notes twice.
        found["notes"] = list({json.dumps(note): note for note in found["notes"]}.values())

        ends = outcomes(entries)
        jobs = [*ends.values(), *(_not_begun(name) for name in self._missing if name not in ends)]
        is_goal_device = any(name in self.device["name"] for name in GOAL_DEVICES)
        head = {name: self.head[name] for name in HEAD}
        return head | {
            "made": self.head.get("made"),
            "finished": not self._missing and not why,
            "why_not_finished": why or ("still running" if self._missing else ""),
            "jobs": jobs,
            "tests": _suite(entries, ends),
            "goals": [goal._asdict() for goal in goals(found["rows"])] if is_goal_device else [],
            **found,
        }


def _make(out: Path) -> None:
    """Make the folder of the results.

    ResultsError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f"probe.{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResultsError(
            f"--out must be a folder that can be written, got {out}: {error.strerror or error}"
        ) from error


def _not_begun(job: str) -> Entry:
    return {"job": job, "outcome": "not begun", "why": "", "seconds": 0.0}


def _suite(entries: list[Entry], ends: dict[str, Entry]) -> dict[str, Any] | None:
    found = summary(entries)
    end = ends.get("tests", {"outcome": "still running", "why": ""})
    if found is None:
        return {"outcome": end["outcome"], "why": end["why"]} if "tests" in ends else None
    return {"outcome": end["outcome"], "why": end["why"], **found}


def _interrupted(out: Path, settings: dict[str, Any]) -> tuple[RunLog, Entry]:
    """The newest run log in a folder, and its first entry."""
    paths = sorted(out.glob(f"*{RUN_LOG}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ResultsError(f"--resume: no interrupted run in {out}")
    run_log = RunLog(paths[-1])
    head = next(iter(run_log.entries()), {})
    there = {name: head.get(name) for name in settings}
    if differing := differences(_without_commit(there), _without_commit(settings)):
        raise ResultsError(f"--resume: {paths[-1]} was measured otherwise: {'; '.join(differing)}")
    return run_log, head


def _without_commit(settings: dict[str, Any]) -> dict[str, Any]:
    """A commit of pages or tests is no other code: "code" says which it is."""
    versions = settings["versions"] or {}
    return settings | {"versions": {k: v for k, v in versions.items() if k != "commit"}}


def describe(device: torch.device) -> dict[str, Any]:
    """The name of the device; of a GPU also memory, processors and driver."""
    if device.type == "cpu":
        return {"name": f"{platform.machine()} CPU"}
    properties = torch.cuda.get_device_properties(device)
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]

    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "driver, clock, power": _output(command),
    }


def installed() -> dict[str, str]:
    """The versions of everything that is installed and can change a number; in a checkout also the
    commit."""
    found = {
        name: version for name, version in versions(PACKAGES).items() if version != "not installed"
    }
    commit = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return (
        found
        | {"cuda": str(torch.version.cuda)}
        | ({"commit": commit} if commit and TEST_FOLDER.is_dir() else {})
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
