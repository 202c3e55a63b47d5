"""A process for each job, as the run sees it.

So a kernel that never ends, or that leaves the GPU in a state in which nothing runs any more, costs
one job: its process is ended, and the next one starts afresh.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ironmoe.bench.benchmarks.gpu.child import COMPLETE, INCOMPLETE

CHILD = [sys.executable, "-m", "ironmoe.bench.benchmarks.gpu.child"]
GRACE = 3.0  # seconds before its end in which a job stops by itself
POLL = 0.2  # seconds


class Child:
    """A process that has imported everything and waits for its job."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(
        self, request: dict[str, Any], seconds: float, watch: Callable[[], None]
    ) -> tuple[str, str]:
        """Give it the job, call ``watch`` while it works, and end it when the seconds are over.

        Returns:
            ("done", "out of time", "hung" or "died", and why)
        """
        assert self._process.stdin is not None
        end = time.monotonic() + seconds
        try:
            self._process.stdin.write(
                json.dumps(request | {"seconds": max(seconds - GRACE, 0.0)}).encode() + b"\n"
            )
            self._process.stdin.close()
        except OSError:
            pass  # it died before: its last words say why

        try:
            while self._process.poll() is None and time.monotonic() < end:
                watch()
                time.sleep(POLL)
            status = self._process.poll()
        finally:
            self.end()

        watch()
        if status is None:
            return "hung", f"ended after {seconds:.0f} s"
        if status in (COMPLETE, INCOMPLETE):
            return (
                ("done", "")
                if status == COMPLETE
                else ("out of time", f"{seconds:.0f} s were over")
            )

        return "died", f"{_status(status)}: {self._last_words()}"

    def end(self) -> None:
        """End the process and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [
            line.strip()
            for line in self._errors.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
        return lines[-1][:300] if lines else "it said nothing"


def _status(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
