"""``ironmoe bench compare``: two files of rows as tables, and as rows for other programs."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.reading.comparison import (
    AS_OTHERS,
    DRIFT,
    SAME,
    Change,
    Comparison,
    mean_change,
)
from ironmoe.bench.benchmarks.reading.figures import SHARE, TIME, Figure, Reading
from ironmoe.bench.benchmarks.reading.files import Key
from ironmoe.bench.benchmarks.reading.kinds import Kind, telling
from ironmoe.bench.benchmarks.reading.origin_words import other_differences, warnings
from ironmoe.bench.benchmarks.reading.origins import in_one_line
from ironmoe.bench.common.files import finite
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import written_rows
from ironmoe.bench.reports.tables import print_table, terminal_table

if TYPE_CHECKING:
    from rich.console import Console

MOST_NAMED = 5  # rows that only one file has


def show_comparison(found: Comparison, form: str | None, console: "Console") -> str:
    """Print what both files are and what they say together.

    Args:
        form: "csv" or "md": the rows are returned as text; "json": all is; None: nothing is.
        console: for what is not returned.
    """
    for line in _origins(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in all_warnings(found):
        console.print(line, style="bold red", highlight=False, markup=False, soft_wrap=True)
    if form is None:
        for table in [*_tables(found), _means(found)]:
            print_table(table, console)
    for line in [*_left_out(found), *_legend(found)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if form == "json":
        return json.dumps(finite(as_json(found)), indent=1, ensure_ascii=False) + "\n"
    return "" if form is None else written_rows(map(row_of, found.changes), form)


def all_warnings(found: Comparison) -> list[str]:
    """What has to be known before a ratio is read."""
    if all(change.kind.computed for change in found.changes):
        return []
    return warnings(found.a.facts, found.b.facts)


def row_of(change: Change) -> dict[str, Any]:
    """One figure of one row. "ratio" is B / A, "difference" B − A; "noise" as ``Change`` has it."""
    a, b = change.a.value, change.b.value
    return {
        "benchmark": change.kind.name,
        **dict(zip(change.kind.keys, change.key, strict=True)),
        "figure": change.figure.name,
        "a": a,
        "b": b,
        "ratio": b / a if a else None,
        "difference": b - a,
        "noise": change.noise,
        "verdict": change.verdict or "noise unknown",
    }


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything: both files, what differs, each row, means, and rows that only one file has."""
    return {
        "a": {"file": str(found.a.path), "origin": found.a.facts},
        "b": {"file": str(found.b.path), "origin": found.b.facts},
        "warnings": all_warnings(found),
        "differences": other_differences(found.a.facts, found.b.facts),
        "rows": [row_of(change) for change in found.changes],
        "means": [
            {
                "benchmark": mean.kind.name,
                "figure": mean.figure.name,
                mean.kind.who: mean.who,
                "rows": mean.rows,
                "difference" if mean.figure.sort == SHARE else "ratio": mean.change,
            }
            for mean in found.means()
        ],
        "only_a": [_named(kind, key) for kind, key in found.only_a],
        "only_b": [_named(kind, key) for kind, key in found.only_b],
    }


def _named(kind: Kind, key: Key) -> dict[str, str]:
    return {"benchmark": kind.name, **dict(zip(kind.keys, key, strict=True))}


def _origins(found: Comparison) -> list[str]:
    lines = [
        f"{name}: {file.path} ({in_one_line(file.facts) or 'rows alone, without their origin'})"
        for name, file in _both(found)
    ]
    if differences := other_differences(found.a.facts, found.b.facts):
        lines.append(f"Versions differ: {'; '.join(differences)}.")
    return lines


def _both(found: Comparison) -> Iterable[tuple[str, Any]]:
    return ("A", found.a), ("B", found.b)


def _tables(found: Comparison) -> list[Table]:
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in found.changes:
        groups.setdefault((change.kind.name, change.figure.name), []).append(change)
    return [_table(group) for group in groups.values()]


def _table(changes: Sequence[Change]) -> Table:
    """One figure. Rows that differ in the last part of their names alone stand under a heading."""
    kind, figure = changes[0].kind, changes[0].figure
    shown = telling([change.key for change in changes])
    headings = {kind.words(change.key, shown[:-1]) for change in changes}
    grouped = 1 < len(headings) < len(changes)

    change_of = "B − A" if figure.sort == SHARE else "B / A"
    beside = "beside the others" if any(change.others for change in changes) else ""
    columns = ["row", "A", "B", change_of, "noise", beside]
    table = terminal_table(columns, title=_title(changes))
    last = None
    for change in changes:
        heading = kind.words(change.key, shown[:-1])
        if grouped and heading != last:
            table.add_row(heading)
            last = heading
        table.add_row(
            f"  {kind.part(change.key, shown[-1])}" if grouped else kind.words(change.key, shown),
            _value(change.a, figure),
            _value(change.b, figure),
            _change(change.change, figure),
            _noise(change.noise, figure),
            change.verdict,
            style=None if change.verdict in ("", SAME, AS_OTHERS) else "bold",
        )
    return table


def _title(changes: Sequence[Change]) -> str:
    """The benchmark, the figure, and what is the same in the names of all rows."""
    kind, figure = changes[0].kind, changes[0].figure
    shown = telling([change.key for change in changes])
    unit = f" in {figure.unit}" if figure.unit not in (figure.name, "%") else ""
    same = kind.words(changes[0].key, [i for i in range(len(kind.keys)) if i not in shown])
    return f"{kind.name}: {figure.name}{unit}" + (f" ({same})" if same else "")


def _means(found: Comparison) -> Table:
    table = terminal_table(["figure", "whose", "rows", "B / A"], title="Geometric means", names=2)
    for mean in found.means():
        table.add_row(
            f"{mean.kind.name}: {mean.figure.name}",
            mean.who,
            str(mean.rows),
            _change(mean.change, mean.figure),
        )
    return table


def _value(reading: Reading, figure: Figure) -> str:
    value = reading.value
    if figure.sort == SHARE:
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _change(change: float, figure: Figure) -> str:
    if math.isnan(change):
        return "–"
    return f"{100 * change:+.1f}" if figure.sort == SHARE else f"{change:.3f}×"


def _noise(noise: float | None, figure: Figure) -> str:
    if noise is None:
        return "–"
    return f"±{100 * noise:.1f}" if figure.sort == SHARE else f"±{100 * noise:.0f} %"


def _left_out(found: Comparison) -> list[str]:
    lines = []
    for name, keys in (("A", found.only_a), ("B", found.only_b)):
        if keys:
            named = "; ".join(" ".join(key) for _, key in keys[:MOST_NAMED])
            more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
            lines.append(f"Only {name} has {counted(len(keys), 'row')}: {named}{more}.")
    for name, file in _both(found):
        if file.repeated and not all(kind.computed for kind in file.kinds):
            times = counted(file.repeated, "row")
            lines.append(f"{name} has {times} more than once: the median counts.")
    return lines


def _legend(found: Comparison) -> list[str]:
    if all(change.noise is None for change in found.changes):
        unknown = "Noise: these rows do not say how much their runs scatter."
        return [*_of_others(found), unknown]
    return [
        *_of_others(found),
        "Noise: by how much B must differ from A so that the ranges of their runs are apart. "
        f'"{SAME}": it differs by no more, or a measured figure by {100 * DRIFT:.0f} % at most. '
        "–: the rows do not say it.",
    ]


def _of_others(found: Comparison) -> list[str]:
    """How much the times of code changed that is not ours: where the machine changed, too."""
    times = [
        change for change in found.changes if change.figure.sort == TIME and change.kind.has_others
    ]
    ours = [change for change in times if change.is_ours]
    others = [change for change in times if not change.is_ours]
    if not ours or not others:
        return []
    return [
        f"Times of {OURS} changed by {mean_change(ours):.3f}×, those of others in the same rows by "
        f"{mean_change(others):.3f}×: that is what the machine and its libraries did.",
        f'"{AS_OTHERS}": the ratio lies between 1 and those of the others that took turns in the '
        f"same row, give or take {100 * DRIFT:.0f} %, so the machine may be why.",
    ]
