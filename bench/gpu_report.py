"""What a run on a GPU found, against the goals, as Markdown."""

import math
from typing import Any, NamedTuple

from ironmoe.bench.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.peers import OURS, PEERS
from ironmoe.bench.roofline import MOVES_ROWS
from ironmoe.bench.shapes import MAIN

Row = dict[str, Any]
GOAL_DEVICE, GOAL_DTYPE = "H100", "bfloat16"
GOAL_TFLOPS = {FORWARD: 550.0, DX: 520.0, FULL: 480.0}
READING = (
    "Median milliseconds of calls in turns; TFLOP/s count the products that the pass needs; *of product* is the share of a bf16",
    "product of 8192² matrices, *of copy* that of a copy, both timed in the same turns; *H100 limit* is the roofline of our kernels;",
    "*peak* is what a call allocates beyond what was there, *saved* what autograd keeps, *host* the time to ask for the call.",
)
GOAL_DX_OF_FULL, GOAL_MOVING_SHARE, GOAL_ROUTER_SHARE = 0.68, 0.10, 0.80


class Goal(NamedTuple):
    """``met`` is None where what it needs was not measured."""

    text: str
    measured: str
    met: bool | None


def goals(rows: list[Row]) -> list[Goal]:
    """The goals for an H100 in bfloat16, against the rows of one run."""
    ours = {(r["shape"], r["pass"]): r for r in rows if r["implementation"] == OURS and _is_main_setting(r)}

    def at_main(pass_name: str, figure: str = "ms") -> float:
        row = ours.get((MAIN.name, pass_name))
        return float("nan") if row is None else row[figure]

    topk, dispatch, combined = (at_main(f"kernel {name}") for name in MOVES_ROWS)
    moving_share = (topk + dispatch + combined) / (topk + at_main(INFERENCE))  # the layer's time has dispatch and combine in it
    router_share = at_main("kernel topk_route", "share_of_copy")
    return [
        *(_at_least(f"{name}, TFLOP/s", wanted, at_main(name, "tflops"), ".0f") for name, wanted in GOAL_TFLOPS.items()),
        _at_most(f"{DX}, of the time of {FULL}", GOAL_DX_OF_FULL, at_main(DX) / at_main(FULL), ".2f"),
        _at_most("routing + dispatch + combine, of the layer", GOAL_MOVING_SHARE, moving_share, ".1%"),
        _at_least("the router kernel, of copy bandwidth", GOAL_ROUTER_SHARE, router_share, ".0%"),
        _fused_goal(rows),
    ]


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
    ours = {_place(r): r["ms"] for r in rows if r["implementation"] == OURS}
    ratios = {
        f"{r['implementation']}, {r['shape']}, {r['routing']}, {r['pass']}": r["ms"] / ours[_place(r)]
        for r in rows
        if r["implementation"] in PEERS and PEERS[r["implementation"]].fused and _place(r) in ours
    }
    if not ratios:
        return Goal(text, "not measured", None)
    closest = min(ratios, key=lambda name: ratios[name])
    return Goal(text, f"the best of {len(ratios)} takes {ratios[closest]:.2f} of our time ({closest})", ratios[closest] >= 1)


def _place(row: Row) -> tuple[str, ...]:
    return row["shape"], row["routing"], row["pass"], row["dtype"]


def markdown(results: dict[str, Any]) -> str:
    """Device, tests, goals, a table for each layer, and who was not measured."""
    lines = [f"# {results['device']['name']}, {results['date']}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".", ""]
    if not results["finished"]:
        lines += [f"Not finished: {results['why_not_finished'] or 'still running'}.", ""]
    lines += [*READING, ""]
    if "CPU" in results["device"]["name"]:
        lines += ["**A rehearsal on a CPU: the figures mean nothing.**", ""]
    lines += _suite_lines(results["tests"])
    if results["goals"]:
        lines += [
            "## Goals",
            "",
            f"For one {GOAL_DEVICE} and {GOAL_DTYPE}, at {MAIN.name}.",
            "",
            "| goal | measured | met |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {g['text']} | {g['measured']} | {_YES_NO[g['met']]} |" for g in results["goals"]] + [""]
    lines += _tables(results["rows"])
    if results["tuning"]:
        lines += ["## Tuning", "", "```python", *results["tuning"]["text"], "```", ""]
    if results["notes"]:
        lines += ["## Not measured", "", "| implementation | where | why |", "| --- | --- | --- |"]
        where: dict[tuple[str, str], list[str]] = {}
        for note in results["notes"]:
            where.setdefault((note["implementation"], note["why"].replace("|", "/")), []).append(
                f"{note['shape']} {note['routing']}"
            )
        lines += [f"| {name} | {', '.join(places)} | {why} |" for (name, why), places in where.items()]
    return "\n".join(lines).rstrip() + "\n"  # fmt: skip


_YES_NO = {True: "yes", False: "**no**", None: "–"}


def _suite_lines(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return []
    counts = ", ".join(f"{count} {word}" for word, count in tests["counts"].items())
    lines = [
        "## Tests on this device",
        "",
        f"{tests['outcome']}{': ' if counts or tests['why'] else ''}{counts or tests['why']}.",
        "",
    ]
    if tests["left_out"]:
        needs = sorted({package for missing in tests["left_out"].values() for package in missing})
        lines += [f"Left out {len(tests['left_out'])} files that need {', '.join(needs)}: {', '.join(tests['left_out'])}.", ""]
    return lines + [f"- `{failure}`" for failure in tests["failures"]] + [""] * bool(tests["failures"])


def _tables(rows: list[Row]) -> list[str]:
    lines = []
    for place in dict.fromkeys((r["shape"], r["routing"], r["dtype"]) for r in rows):
        here = [r for r in rows if (r["shape"], r["routing"], r["dtype"]) == place]
        first = here[0]
        biases = ", biases" if first["bias"] else ""
        lines += [
            f"## {place[0]}, {place[1]}, {place[2]}",
            "",
            f"(T, D, F, E, K) = {tuple(first['sizes'])}, {first['activation']}{biases}.",
            "",
        ]
        columns = "pass|implementation|ms|p20–p80|TFLOP/s|of product|GB/s|of copy|H100 limit ms|peak MB|saved MB|host ms"
        lines += [f"| {columns.replace('|', ' | ')} |", "|" + " --- |" * (columns.count("|") + 1)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in here] + [""]
    return lines  # fmt: skip


def _cells(row: Row) -> list[str]:
    def figure(name: str, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "–" if value is None else form.format(value * scale)

    return [
        row["pass"], row["implementation"], figure("ms", "{:.3f}"), f"{row['p20']:.3f}–{row['p80']:.3f}",
        figure("tflops", "{:.1f}"), figure("share_of_product", "{:.1%}"), figure("gb_per_s", "{:.0f}"),
        figure("share_of_copy", "{:.0%}"), figure("limit_ms", "{:.3f}"), figure("peak_bytes", "{:.0f}", 1e-6),
        figure("saved_bytes", "{:.0f}", 1e-6), figure("host_ms", "{:.3f}"),
    ]  # fmt: skip
