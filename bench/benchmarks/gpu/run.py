"""Do the jobs one after the other, within the minutes. What they find is printed and written to
disk at once."""

import time
from collections.abc import Callable
from typing import Any

from ironmoe.bench.benchmarks.gpu.jobs import CASE, TESTS, GpuJob, plan
from ironmoe.bench.benchmarks.gpu.options import GpuOptions
from ironmoe.bench.benchmarks.gpu.process import Child
from ironmoe.bench.benchmarks.gpu.report import minutes_and_seconds, news, plan_lines, wrong
from ironmoe.bench.benchmarks.gpu.results import Results
from ironmoe.bench.benchmarks.gpu.run_log import Entry, Pen, outcomes, under_way
from ironmoe.bench.benchmarks.gpu.tasks.suite import outcomes_of_tests, run_suite
from ironmoe.bench.benchmarks.peers import OURS, PEERS
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.timing import Countdown

REPORT_SECONDS = 8.0  # kept back for the last files
LEAST = 5.0  # seconds that must be left for a job to begin
SAY_EVERY = 10.0  # seconds between two lines, at most
DONE = ("done", "passed", "failed", "died", "hung")  # outcomes after which a job is not done again


class GpuRun:
    """One run: its jobs, its run log, its countdown."""

    def __init__(self, options: GpuOptions, say: Callable[[str], None]) -> None:
        self.options = options
        self.countdown = Countdown(60 * options.minutes - REPORT_SECONDS)
        on_gpu = options.device.type == "cuda"
        self.jobs = plan(options.shapes, options.minutes, on_gpu, options.kinds)
        self.results = Results(
            options.out, options.device, options.dtype, options.minutes, options.resume
        )
        self.run_log = self.results.run_log

        self._say = say
        self._start = time.monotonic()
        self._said = 0.0  # when the last line was printed
        self._waiting: Child | None = None  # imports already, for the job after this one
        self._number = 0  # of the job that is under way
        self._job: GpuJob = self.jobs[0] if self.jobs else GpuJob(TESTS)

    def all(self) -> None:
        """Do every job that the countdown allows and that is not done yet."""
        done = {
            name for name, end in outcomes(self.run_log.entries()).items() if end["outcome"] in DONE
        }
        missing = [job for job in self.jobs if job.name not in done]
        self.run_log.news()  # an earlier run has printed these

        device = self.results.device["name"]
        for line in plan_lines(missing, len(done), self.options.minutes, device):
            self._say(line)
        self.results.write([job.name for job in missing])
        try:
            for i, job in enumerate(missing):
                self._number = len(self.jobs) - len(missing) + i + 1
                if self.countdown.left() < LEAST:
                    return
                self._do(job, is_last=i == len(missing) - 1)
                self.results.write([job.name for job in missing[i + 1 :]])
        finally:
            if self._waiting is not None:
                self._waiting.end()

    def _do(self, job: GpuJob, is_last: bool) -> None:
        self._job = job
        start = time.monotonic()
        seconds = min(job.limit, self.countdown.left())

        self.say(f"{job.name} …")
        if job.kind == TESTS:
            outcome, why = run_suite(seconds, self.run_log, self._watch)
        else:
            outcome, why = self._in_child(job, seconds, is_last)

        self.run_log.write(
            "end",
            job=job.name,
            outcome=outcome,
            why=why,
            seconds=round(time.monotonic() - start, 1),
        )
        self._watch()
        if outcome != "done":
            self.say(f"{job.name}: {outcome}{': ' if why else ''}{why}")

    def _in_child(self, job: GpuJob, seconds: float, is_last: bool) -> tuple[str, str]:
        """Do the job in a process of its own. If a peer ends the process, do it again without that
        peer.

        Returns:
            (outcome, why)
        """
        countdown, without = Countdown(seconds), list[str]()
        while True:
            # the next process imports everything while this one works
            child = self._waiting or Child()
            self._waiting = None if is_last else Child()
            outcome, why = child.run(
                self._request(job, without), max(countdown.left(), LEAST), self._watch
            )
            if outcome not in ("died", "hung"):
                return outcome, why

            part, who = under_way(self.run_log.entries(), job.name)
            why += f", in {part}" if part else ""
            if outcome == "hung" and seconds < job.limit:
                return "out of time", why

            self._note(job, who, f"{outcome}: {why}")
            if who not in PEERS or who in without or countdown.left() < LEAST:
                return outcome, why

            without.append(who)
            self.say(f"{job.name}: {outcome}: {why}; again without {who}")

    def _request(self, job: GpuJob, without: list[str]) -> dict[str, Any]:
        return {
            "kind": job.kind,
            "shape": job.shape.name if job.shape else "",
            "routing": job.routing,
            "without": without,
            "device": str(self.options.device),
            "dtype": dtype_name(self.options.dtype),
            "run_log": str(self.run_log.path.resolve()),
            "rounds": 20 if self.options.device.type == "cuda" else 3,
        }

    def _note(self, job: GpuJob, who: str, why: str) -> None:
        if job.kind == CASE and job.shape is not None:
            dtype = dtype_name(self.options.dtype)
            note = {
                "implementation": who if who in PEERS else OURS,
                "shape": job.shape.name,
                "routing": job.routing,
                "dtype": dtype,
            }
            Pen(self.run_log, job.name).finish(
                f"end with {who}", notes=[note | {"kind": "failed", "why": why}]
            )

    def _watch(self) -> None:
        """Print what is new in the run log, and bring the files up to date."""
        entries = self.run_log.news()
        for line in (line for entry in entries for line in news(entry)):
            self.say(line)
        if any(entry["kind"] == "part" for entry in entries):
            self.results.write()
        if time.monotonic() - self._said > SAY_EVERY:
            self.say(self._under_way(self.run_log.entries()))
            self.results.write()

    def _under_way(self, entries: list[Entry]) -> str:
        """What the job is doing, for a job that has printed nothing for a while."""
        if self._job.kind == TESTS:
            found = [test["outcome"] for test in outcomes_of_tests(entries).values()]
            of = next((entry["count"] for entry in entries if entry["kind"] == "collected"), 0)
            done = len(found) - found.count("running")
            return (
                f"{done} of {of} tests, {found.count('failed')} failed"
                if of
                else "tests: being collected"
            )

        part, who = under_way(entries, self._job.name)
        return (
            f"{self._job.name}: {part} of {who} …" if part else f"{self._job.name}: being prepared"
        )

    def say(self, line: str) -> None:
        """Print a line, with the number of the job and the time."""
        self._said = time.monotonic()
        now = minutes_and_seconds(time.monotonic() - self._start)
        self._say(
            f"[{self._number}/{len(self.jobs)} {now} of "
            f"{minutes_and_seconds(60 * self.options.minutes)}] {line}"
        )


def say_at_once(line: str) -> None:
    """Print a line at once, so that it is seen while the run goes on, and after a kill."""
    print(line, flush=True)


def run_bench_gpu(options: GpuOptions, say: Callable[[str], None] = say_at_once) -> int:
    """Run everything.

    Returns:
        0 if the tests passed (or were not asked for) and nothing of ours was wrong, failed or hung;
            else 1.
    """
    run = GpuRun(options, say)
    results = run.results
    why = ""

    try:
        run.all()
    except KeyboardInterrupt:
        why = "interrupted"
        raise
    finally:
        content = results.finish([job.name for job in run.jobs], why)
        for goal in content["goals"]:
            verdict = {True: "met", False: "MISSED", None: "–"}[goal["met"]]
            say(f"{verdict:<6} {goal['text']}: {goal['measured']}")
        unfinished = content["why_not_finished"]
        say(
            f"Wrote {results.stem}.json and .md"
            + (f"; not finished: {unfinished}; --resume goes on" if unfinished else "")
        )

    faults = wrong(content, asked_for_tests=TESTS in options.kinds)
    for fault in faults:
        say(f"WRONG  {fault}")

    return int(bool(faults))
