"""What a run on a GPU found, against the goals: what was missed, what is wrong, and what is said
while it runs.
"""

import math
from typing import Any, NamedTuple

from ironmoe.bench.gpu.jobs import Job
from ironmoe.bench.gpu.journal import Entry
from ironmoe.bench.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.peers import OURS, PEERS
from ironmoe.bench.roofline import MOVES_ROWS
from ironmoe.bench.shapes import MAIN

Row = dict[str, Any]
GOAL_DEVICES, GOAL_DTYPE = (
    ("H100", "H200"),
    "bfloat16",
)  # the same processors; an H200 has faster memory
GOAL_TFLOPS = {FORWARD: 550.0, DX: 520.0, FULL: 480.0}
GOAL_DX_OF_FULL, GOAL_MOVING_SHARE, GOAL_ROUTER_SHARE = 0.68, 0.10, 0.80


class Goal(NamedTuple):
    """``met`` is None where what it needs was not measured; False where the results were wrong,
    whatever their time.
    """

    text: str
    measured: str
    met: bool | None


def goals(rows: list[Row]) -> list[Goal]:
    """The goals for an H100 in bfloat16, against the rows of one run."""
    ours = {(r["shape"], r["pass"]): r for r in rows if r["implementation"] == OURS and _is_main_setting(r)}
    wrong_at_main = any(shape == MAIN.name and r.get("agrees") is False for (shape, _), r in ours.items())

    def at_main(pass_name: str, figure: str = "ms") -> float:
        row = ours.get((MAIN.name, pass_name))
        return float("nan") if row is None or wrong_at_main else row[figure]

    topk, dispatch, combined = (at_main(f"kernel {name}") for name in MOVES_ROWS)
    moving_share = (topk + dispatch + combined) / (topk + at_main(INFERENCE))  # the layer's time has dispatch and combine in it
    router_share = at_main("kernel topk_route", "share_of_copy")
    found = [
        *(_at_least(f"{name}, TFLOP/s", wanted, at_main(name, "tflops"), ".0f") for name, wanted in GOAL_TFLOPS.items()),
        _at_most(f"{DX}, of the time of {FULL}", GOAL_DX_OF_FULL, at_main(DX) / at_main(FULL), ".2f"),
        _at_most("routing + dispatch + combine, of the layer", GOAL_MOVING_SHARE, moving_share, ".1%"),
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
    return Goal(text, "not measured", None) if math.isnan(value) else Goal(text, f"{value:{form}}", met)


def _fused_goal(rows: list[Row]) -> Goal:
    text = "no fused peer faster at any shape and pass"
    right = [row for row in rows if row.get("agrees") is not False]
    ours = {_place(r): r["ms"] for r in right if r["implementation"] == OURS}
    ratios = {
        f"{r['implementation']}, {r['shape']}, {r['routing']}, {r['pass']}": r["ms"] / ours[_place(r)]
        for r in right
        if r["implementation"] in PEERS and PEERS[r["implementation"]].fused and _place(r) in ours
    }
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
    """What makes the exit status 1, a line each."""
    ours = [note for note in content["notes"] if note["implementation"] == OURS and note["kind"] in ("disagrees", "failed")]
    found = [f"ironmoe at {note['shape']}, {note['routing']}: {note['why']}" for note in ours]
    tests = content["tests"]
    if asked_for_tests and tests is not None and tests["outcome"] != "passed":
        found.append(f"tests: {tests['outcome']}{': ' if tests['why'] else ''}{tests['why']}")
    found += [f"{row['check']} at {row['shape']}: {row['why']}" for row in content["checks"] if row["passed"] is False]
    found += [f"{row['way']} on {row['model']}: {row['why']}" for row in content["attack"] if row.get("why")]
    found += [f"{job['job']}: {job['outcome']}: {job['why']}" for job in content["jobs"] if job["outcome"] in ("died", "hung")]
    return found


def minutes_and_seconds(seconds: float) -> str:
    """4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def plan_lines(jobs: list[Job], num_done: int, minutes: float, device: str) -> list[str]:
    """When each job is thought to begin, and which the minutes do not reach."""
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
    """What is said of an entry of the journal when it comes."""
    if entry["kind"] == "test" and entry["outcome"] == "failed":
        return [f"FAILED {entry['test']}: {entry['why'].splitlines()[0] if entry['why'] else ''}"]
    if entry["kind"] != "part":
        return []
    lines = [_timed_line(entry)] if any("tflops" in row for row in entry.get("rows", ())) else []
    for note in entry.get("notes", ()):
        if note["kind"] != "absent":
            lines.append(f"{note['implementation']} {note['kind']}: {note['why']}")
    for row in entry.get("compiled", ()):
        lines.append(
            f"{row['kernels']} kernels compiled in {row['seconds']:.1f} s, {row['from_cache']} from the cache; {row['longest']}"
        )
    for row in entry.get("blocks", ()):
        timed = f"{row['ms']:.3f} ms, before {row['former_ms']:.3f}" if "ms" in row else row["why"]
        lines.append(f"{row['product']}{', ' if 'pass' in row else ''}{row.get('pass', '')}: {timed}")
    for row in entry.get("attack", ()):
        lines.append(f"{row['way']}: " + (row["why"] if "why" in row else f"{row['images_per_s']:.0f} images/s"))
    for row in entry.get("checks", ()):
        verdict = {True: "passed", False: "FAILED", None: "not run"}[row["passed"]]
        lines.append(f"{row['check']}: {verdict}{': ' if row['why'] else ''}{row['why']}")
    lines += [row["text"] for row in entry.get("tuning", ())]
    return lines


def _timed_line(entry: Entry) -> str:
    rows = [row for row in entry["rows"] if "tflops" in row]
    figures = [
        f"{row['implementation']} {row['ms']:.3f} ms"
        + (f" ({row['tflops']:.0f} TFLOP/s)" if row["implementation"] == OURS else "")
        + (" WRONG" if row.get("agrees") is False else "")
        for row in rows
    ]
    return f"{entry['part']}: {', '.join(figures)}"
