"""What is said of a run on a GPU: which goals it met, what is wrong, and the lines while it
runs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ironmoe.bench.benchmarks.gpu.jobs import GpuJob
from ironmoe.bench.benchmarks.gpu.run_log import Entry, Row
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.benchmarks.peers import OURS, PEERS
from ironmoe.bench.benchmarks.roofline import MOVES_ROWS
from ironmoe.bench.benchmarks.shapes import MAIN

GOAL_DEVICES = ("H100", "H200")  # the same processors; an H200 has faster memory
GOAL_DTYPE = "bfloat16"
GOAL_TFLOPS = {FORWARD: 550.0, DX: 520.0, FULL: 480.0}
MOVING = "routing + dispatch + combine"
GOAL_DX_OF_FULL = 0.68
GOAL_MOVING_SHARE = 0.10
GOAL_ROUTER_SHARE = 0.80


class Goal(NamedTuple):
    """A goal, and whether it is met: None if what it needs was not measured; False, whatever the
    time, if the results were wrong."""

    text: str
    measured: str
    met: bool | None


def goals(rows: list[Row]) -> list[Goal]:
    """The goals for an H100 in bfloat16, judged by the rows of one run."""
    ours = {
        row["pass"]: row
        for row in rows
        if row["implementation"] == OURS and row["shape"] == MAIN.name and _is_main_setting(row)
    }
    wrong_at_main = any(row.get("agrees") is False for row in ours.values())

    def at_main(pass_name: str, figure: str = "ms") -> float:
        row = ours.get(pass_name)
        return float("nan") if row is None or wrong_at_main else row[figure]

    topk, dispatch, combined = (at_main(f"kernel {name}") for name in MOVES_ROWS)
    layer = topk + at_main(INFERENCE)  # whose time has dispatch and combine in it
    moving_share = (topk + dispatch + combined) / layer
    speeds = {name: at_main(name, "tflops") for name in GOAL_TFLOPS}
    dx_of_full = at_main(DX) / at_main(FULL)
    router_share = at_main("kernel topk_route", "share_of_copy")
    found = [
        *(_at_least(f"{name}, TFLOP/s", GOAL_TFLOPS[name], speeds[name], ".0f") for name in speeds),
        _at_most(f"{DX}, of the time of {FULL}", GOAL_DX_OF_FULL, dx_of_full, ".2f"),
        _at_most(f"{MOVING}, of the layer", GOAL_MOVING_SHARE, moving_share, ".1%"),
        _at_least("the router kernel, of copy bandwidth", GOAL_ROUTER_SHARE, router_share, ".0%"),
    ]
    if wrong_at_main:
        found = [goal._replace(measured="our results are wrong", met=False) for goal in found]
    return [*found, _fused_goal(rows)]


def _is_main_setting(row: Row) -> bool:
    return row["routing"] == "uniform" and row["dtype"] == GOAL_DTYPE


def _at_least(text: str, wanted: float, value: float, form: str) -> Goal:
    return _goal(f"{text}: ≥ {wanted:{form}}", value, value >= wanted, form)


def _at_most(text: str, wanted: float, value: float, form: str) -> Goal:
    return _goal(f"{text}: ≤ {wanted:{form}}", value, value <= wanted, form)


def _goal(text: str, value: float, met: bool, form: str) -> Goal:
    if math.isnan(value):
        return Goal(text, "not measured", None)
    return Goal(text, f"{value:{form}}", met)


def _fused_goal(rows: list[Row]) -> Goal:
    text = "no fused peer faster at any shape and pass"
    right = [row for row in rows if row.get("agrees") is not False]
    ours = {_place(r): r["ms"] for r in right if r["implementation"] == OURS}
    ratios = {}

    for row in right:
        peer = PEERS.get(row["implementation"])
        if peer and peer.fused and _place(row) in ours:
            name = ", ".join([row["implementation"], *_place(row)[:3]])
            ratios[name] = row["ms"] / ours[_place(row)]

    if not ratios:
        return Goal(text, "not measured", None)
    closest = min(ratios, key=lambda name: ratios[name])
    return Goal(
        text,
        f"the best of {len(ratios)} takes {ratios[closest]:.2f} of our time ({closest})",
        ratios[closest] >= 1,
    )


def _place(row: Row) -> tuple[str, ...]:
    return row["shape"], row["routing"], row["pass"], row["dtype"]


def wrong(content: dict[str, Any], asked_for_tests: bool) -> list[str]:
    """A line for everything that makes the exit status 1."""
    found = [
        f"ironmoe at {note['shape']}, {note['routing']}: {note['why']}"
        for note in content["notes"]
        if note["implementation"] == OURS and note["kind"] in ("disagrees", "failed")
    ]
    tests = content["tests"]
    if asked_for_tests and tests is not None and tests["outcome"] != "passed":
        found.append(f"tests: {tests['outcome']}{': ' if tests['why'] else ''}{tests['why']}")

    for row in content["checks"]:
        if row["passed"] is False:
            found.append(f"{row['check']} at {row['shape']}: {row['why']}")

    for row in content["attack"]:
        if row.get("why"):
            found.append(f"{row['way']} on {row['model']}: {row['why']}")

    for job in content["jobs"]:
        if job["outcome"] in ("died", "hung"):
            found.append(f"{job['job']}: {job['outcome']}: {job['why']}")

    return found


def minutes_and_seconds(seconds: float) -> str:
    """A time such as 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def plan_lines(jobs: list[GpuJob], num_done: int, minutes: float, device: str) -> list[str]:
    """Lines that say when each job is expected to begin, and which jobs the minutes do not
    reach."""
    lines = [
        f"{device}: {len(jobs)} jobs"
        + (f", {num_done} are done already" if num_done else "")
        + "; the plan (estimates of a GPU's seconds):"
    ]
    start, cut = 0.0, []
    for job in jobs:
        if start + job.seconds > 60 * minutes:
            cut.append(job.name)
        else:
            lines.append(f"  {minutes_and_seconds(start):>6}  {job.seconds:4.0f} s  {job.name}")
        start += job.seconds

    if cut:
        lines.append(f"  if there is time: {', '.join(cut)}")
    return lines


def news(entry: Entry) -> list[str]:
    """The lines that are printed when an entry comes into the run log."""
    if entry["kind"] == "test" and entry["outcome"] == "failed":
        return [f"FAILED {entry['test']}: {entry['why'].splitlines()[0] if entry['why'] else ''}"]
    if entry["kind"] != "part":
        return []

    timed = [row for row in entry.get("rows", ()) if "tflops" in row]
    lines = [_timed_line(entry["part"], timed)] if timed else []
    for table, line in NEWS.items():
        lines += [line(row) for row in entry.get(table, ())]
    return [line for line in lines if line]


def _timed_line(part: str, rows: list[Row]) -> str:
    figures = [
        f"{row['implementation']} {row['ms']:.3f} ms"
        + (f" ({row['tflops']:.0f} TFLOP/s)" if row["implementation"] == OURS else "")
        + (" WRONG" if row.get("agrees") is False else "")
        for row in rows
    ]
    return f"{part}: {', '.join(figures)}"


def _note(row: Row) -> str:
    """A line about a note; none about a peer that is not installed, which the report lists."""
    return "" if row["kind"] == "absent" else f"{row['implementation']} {row['kind']}: {row['why']}"


def _compiled(row: Row) -> str:
    compiled = f"{row['kernels']} kernels compiled in {row['seconds']:.1f} s"
    return f"{compiled}, {row['from_cache']} from the cache; {row['longest']}"


def _blocks(row: Row) -> str:
    place = f"{row['product']}, {row['pass']}" if "pass" in row else row["product"]
    timed = f"{row['ms']:.3f} ms, before {row['former_ms']:.3f}" if "ms" in row else row["why"]
    return f"{place}: {timed}"


def _attack(row: Row) -> str:
    what = row["why"] if "why" in row else f"{row['images_per_s']:.0f} images/s"
    return f"{row['way']}: {what}"


def _check(row: Row) -> str:
    verdict = {True: "passed", False: "FAILED", None: "not run"}[row["passed"]]
    return f"{row['check']}: {verdict}{': ' if row['why'] else ''}{row['why']}"


# Table of the run log → the line that is printed for one of its rows.
NEWS: dict[str, Callable[[Row], str]] = {
    "notes": _note,
    "compiled": _compiled,
    "blocks": _blocks,
    "attack": _attack,
    "checks": _check,
    "tuning": lambda row: row["text"],
}
