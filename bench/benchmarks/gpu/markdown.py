"""The results of a run on a GPU as Markdown: first what is wrong and which goals are met, then the
tables."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from ironmoe.bench.benchmarks.gpu.jobs import FIRST
from ironmoe.bench.benchmarks.gpu.report import GOAL_DEVICES, GOAL_DTYPE, wrong
from ironmoe.bench.benchmarks.gpu.run_log import Row
from ironmoe.bench.benchmarks.shapes import MAIN, SIZES

READING = (
    "Median milliseconds of calls in turns; TFLOP/s count the products that the pass needs;",
    "*of product* is the share of a bf16 product of 8192² matrices, *of copy* that of a copy, both",
    "timed in the same turns; *H100 limit* is the roofline of our kernels; *peak* is what a call",
    "allocates beyond what was there, *saved* what autograd keeps, *host* the time to ask for the",
    "call; *error* is that of the worst row of any result, bold where it is more than allowed;",
    "*MHz, W, °C* are medians of the processors' clock, the power and the temperature.",
)
COLUMNS = (
    "pass|implementation|ms|p20–p80|TFLOP/s|of product|GB/s|of copy|H100 limit ms|peak MB|"
    "saved MB|host ms|error|MHz, W, °C"
)
YES_NO = {True: "yes", False: "**no**", None: "–"}


def markdown(content: dict[str, Any]) -> str:
    """The whole report. ``content``: what the JSON file holds."""
    lines = [
        *_head(content),
        *_goals(content["goals"]),
        *_tests(content["tests"]),
        *_rows_section("checks", content),
        *_rows_section("blocks", content),
        *_rows_section("attack", content),
        *_layers(content["rows"]),
        *_kernels(content["kernels"]),
        *_rows_section("compiled", content),
        *_tuning(content["tuning"]),
        *_rows_section("jobs", content),
        *_section("Notes", "implementation|where|what", _notes(content["notes"])),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rows_section(name: str, content: dict[str, Any]) -> list[str]:
    """The section of one of SECTIONS: each row of the content has a line in its table."""
    title, columns, cells = SECTIONS[name]
    return _section(title, columns, [cells(row) for row in content[name]])


def _head(content: dict[str, Any]) -> list[str]:
    """Where and when it was measured, whether it is finished, and what is wrong."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [f"# {content['device']['name']}, {content['date']}", "", f"{versions}.", ""]
    if not content["finished"]:
        lines += [f"Not finished: {content['why_not_finished']}.", ""]

    if "CPU" in content["device"]["name"]:
        lines += ["**A rehearsal on a CPU: the figures mean nothing.**", ""]

    if faults := wrong(content, asked_for_tests=True):
        lines += ["## Wrong", "", *(f"- {fault}" for fault in faults), ""]

    return lines


def _goals(goals: list[Row]) -> list[str]:
    title = f"For one {' or '.join(GOAL_DEVICES)} and {GOAL_DTYPE}, at {MAIN.name}."
    found = [[goal["text"], goal["measured"], YES_NO[goal["met"]]] for goal in goals]
    return ["## Goals", "", title, "", *table("goal|measured|met", found)] if goals else []


def _tuning(rows: list[Row]) -> list[str]:
    lines = [row["text"] for row in rows]
    return ["## Tuning", "", "```python", *lines, "```", ""] if rows else []


def _notes(notes: list[Row]) -> list[list[str]]:
    """A row for each implementation and reason, with all places."""
    where: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        places = where.setdefault((note["implementation"], note["why"]), [])
        places.append(f"{note['shape']} {note['routing']}")
    return [[name, ", ".join(places), why] for (name, why), places in where.items()]


def table(columns: str, rows: list[list[str]]) -> list[str]:
    """A table. ``columns``: headers with | between them. A | in a cell is written as /."""
    header = [f"| {columns.replace('|', ' | ')} |", "|" + " --- |" * (columns.count("|") + 1)]
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return [*header, *(f"| {' | '.join(row)} |" for row in cells), ""]


def _section(title: str, columns: str, rows: list[list[str]]) -> list[str]:
    return [f"## {title}", "", *table(columns, rows)] if rows else []


def _tests(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return []
    lines = ["## Tests on this device", ""]
    if "counts" not in tests:
        return [*lines, f"{tests['outcome']}: {tests['why']}.", ""]
    counts = ", ".join(f"{count} {word}" for word, count in tests["counts"].items())
    why = f" ({tests['why']})" if tests["why"] else ""
    lines += [f"{tests['outcome']}{why}: {counts or 'none'} of {tests['of']}.", ""]

    for failure in tests["failures"]:
        lines.append(f"- `{failure['test']}`: {(failure['why'].splitlines() or [''])[0]}")
    lines += [""] * bool(tests["failures"])

    reasons: dict[str, Counter[str]] = {}
    for row in tests["not_run"]:
        reasons.setdefault(row["why"], Counter())[row["file"]] += row["tests"]
    found = [[why, str(files.total()), ", ".join(files)] for why, files in reasons.items()]
    return lines + (["Not run:", "", *table("why|tests|where", found)] if found else [])


def _figure(row: Row, name: str, form: str, scale: float = 1.0) -> str:
    value = row.get(name)
    return "–" if value is None else form.format(value * scale)


def _check(row: Row) -> list[str]:
    passed = "not run" if row["passed"] is None else YES_NO[row["passed"]]
    return [row["check"], row["shape"], passed, row["why"]]


def _compiled(row: Row) -> list[str]:
    seconds = f"{row['seconds']:.1f}"
    return [row["job"], str(row["kernels"]), seconds, str(row["from_cache"]), row["longest"]]


def _job(row: Row) -> list[str]:
    return [row["job"], row["outcome"], f"{row['seconds']:.0f}", row["why"]]


def _blocks(row: Row) -> list[str]:
    present, former = row.get("present", "–"), row.get("former", "–")
    what = row["pass"] if "ms" in row else row["why"]
    times = [_figure(row, name, "{:.3f}") for name in ("ms", "former_ms")]
    return [row["product"], row["shape"], what, *times, present, former]


def _attack(row: Row) -> list[str]:
    place = [row["model"], row["way"], str(row["images"]), str(row["steps"])]
    if "why" in row:
        return [*place, row["why"], "–", "–", "–"]
    return [
        *place,
        f"{row['ms']:.1f}",
        f"{row['images_per_s']:.0f}",
        _figure(row, "same_pixels", "{:.2%}"),
        f"{row['first_call_s']:.1f}",
    ]


# A list of rows in the content → its title, the columns, and the cells of a row.
SECTIONS: dict[str, tuple[str, str, Callable[[Row], list[str]]]] = {
    "checks": ("Checks", "check|shape|passed|why", _check),
    "blocks": (
        "Block sizes now and before",
        "product|shape|pass|ms|ms before|now|before",
        _blocks,
    ),
    "attack": (
        "PGD on a whole model",
        "model|way|images|steps|ms|images/s|same pixels|first call s",
        _attack,
    ),
    "compiled": ("Compiling", "job|kernels|seconds|from the cache|longest", _compiled),
    "jobs": ("Jobs", "job|outcome|seconds|why", _job),
}


def _layers(rows: list[Row]) -> list[str]:
    lines = ["## Layers", "", *READING, ""] if rows else []
    for place in dict.fromkeys((r["shape"], r["routing"], r["dtype"]) for r in rows):
        here = [r for r in rows if (r["shape"], r["routing"], r["dtype"]) == place]
        first = here[0]
        biases = ", biases" if first["bias"] else ""
        numbers = ",".join(map(str, first["sizes"]))
        sizes = f"{SIZES} = {numbers}, {first['activation']}{biases}."
        lines += [
            f"### {place[0]}, {place[1]}, {place[2]}",
            "",
            sizes,
            "",
            *table(COLUMNS, [_cells(row) for row in here]),
        ]

    return lines


def _cells(row: Row) -> list[str]:
    readings = ", ".join(_figure(row, name, "{:.0f}") for name in ("sm_mhz", "watts", "celsius"))
    return [
        row["pass"],
        row["implementation"],
        f"{row['ms']:.3f}",
        f"{row['p20']:.3f}–{row['p80']:.3f}",
        _figure(row, "tflops", "{:.1f}"),
        _figure(row, "share_of_product", "{:.1%}"),
        _figure(row, "gb_per_s", "{:.0f}"),
        _figure(row, "share_of_copy", "{:.0%}"),
        _figure(row, "limit_ms", "{:.3f}"),
        _figure(row, "peak_bytes", "{:.0f}", 1e-6),
        _figure(row, "saved_bytes", "{:.0f}", 1e-6),
        _figure(row, "host_ms", "{:.3f}"),
        _error(row),
        readings if "sm_mhz" in row else "–",
    ]


def _error(row: Row) -> str:
    if row.get("agrees") is not False:
        return _figure(row, "error", "{:.1e}")

    error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
    return f"**{error}** (allowed {row['allowed']:g})"


def _kernels(rows: list[Row]) -> list[str]:
    if not rows:
        return []

    lines = [
        "## Kernels by themselves",
        "",
        "Microseconds of each launch in a call, by torch's profiler; those of the other layers are",
        "in the JSON file.",
        "",
    ]
    shown = [r for r in rows if r["shape"] in FIRST and r["routing"] == "uniform"]
    for place in dict.fromkeys(_kernel_place(r) for r in shown):
        cells = [
            [r["kernel"], str(r["number"] or "all"), f"{r['us']:.1f}", f"{r['share']:.1%}"]
            for r in shown
            if _kernel_place(r) == place
        ]
        lines += [f"### {', '.join(place)}", "", *table("kernel|launch|µs|of the call", cells)]

    return lines


def _kernel_place(row: Row) -> tuple[str, ...]:
    return row["shape"], row["routing"], row["dtype"], row["pass"]
