"""Runs as columns, which take a quarter of the place of rows that each name their numbers."""

from collections.abc import Sequence
from math import isfinite, nan
from typing import Any

from ironmoe.bench.study.claims.parts.outcomes import LEAST_EPS, MARGIN, RADIUS, TOP_DISTANCE
from ironmoe.bench.study.statistics.measured import Measured

OF_IMAGES = (LEAST_EPS, TOP_DISTANCE, MARGIN, RADIUS, "swap", "jump", "certified radius")
"""Numbers of single images that a claim or a figure reads, beside ACCURACIES. All others are only
in the folder ``measured``."""
ACCURACIES = ("clean", "pgd@")
MARGINS = 100  # images whose margin is kept; claims read it beside numbers of fewer images
DIGITS = 10  # the texts of a report then round as they did

Columns = dict[str, Any]


def as_columns(rows: Sequence[Measured]) -> Columns:
    """For JSON.

    runs: arm, training and seed of each; values: name → a number of each run, in the order of
    ``runs``, None where it was not measured; images: name → the numbers of each run's images, a
    text of the digits 0 and 1 where there are no others, None where there is none.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    of_images = list(dict.fromkeys(name for row in rows for name in row.images if _is_kept(name)))
    return {
        "runs": [{"arm": row.arm, "training": row.training, "seed": row.seed} for row in rows],
        "values": {name: [_short(row.values.get(name)) for row in rows] for name in names},
        "images": {
            name: [_packed(name, row.images.get(name)) for row in rows] for name in of_images
        },
    }


def as_rows(columns: Columns) -> list[Measured]:
    """What ``as_columns`` was made from, with ten digits.

    Raises:
        KeyError, TypeError, ValueError: these are no such columns.
    """
    runs = columns["runs"]
    for name, column in [*columns["values"].items(), *columns["images"].items()]:
        if len(column) != len(runs):
            raise ValueError(f"{name!r} has {len(column)} numbers for {len(runs)} runs")
    return [
        Measured(
            str(run["arm"]),
            str(run["training"]),
            int(run["seed"]),
            {
                name: float(column[place])
                for name, column in columns["values"].items()
                if column[place] is not None
            },
            {
                name: _unpacked(column[place])
                for name, column in columns["images"].items()
                if column[place] is not None
            },
        )
        for place, run in enumerate(runs)
    ]


def _is_kept(name: str) -> bool:
    return name in OF_IMAGES or name == ACCURACIES[0] or name.startswith(ACCURACIES[1])


def _short(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else float(f"{value:.{DIGITS}g}")


def _packed(name: str, row: Sequence[float] | None) -> str | list[float | None] | None:
    if row is None:
        return None
    if name == MARGIN:
        row = row[:MARGINS]
    if set(row) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in row)
    return [_short(value) for value in row]


def _unpacked(row: str | list[float | None]) -> list[float]:
    return [nan if value is None else float(value) for value in row]
