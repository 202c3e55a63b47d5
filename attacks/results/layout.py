"""Accuracies laid out as a table of text: a block for each model, a column for each radius."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ironmoe.attacks.results.outcomes import CLEAN
from ironmoe.attacks.results.rows_file import Row

# What tells the blocks of a table apart: the key of a row, and the head of its column.
BLOCKS = {"model": "Model", "data": "Data", "norm": "Norm"}
NOTHING = "--"


class Layout(NamedTuple):
    """A table whose cells are text.

    names: the heads of the columns of names: those of ``BLOCKS`` that the rows have, and "Attack"
    radii: ascending; None stands for the largest radius of each attack
    blocks: of each model its lines, and of each line the cells: names, number of images, clean
        accuracy, an accuracy for each radius. What is the same for a block stands in its first line
    """

    names: list[str]
    radii: list[float | None]
    blocks: list[list[list[str]]]


def laid_out(rows: Sequence[Row], *, intervals: bool = True, digits: int = 1) -> Layout:
    """Rows of ``accuracies``, in percent.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("reports must hold at least one accuracy, got none")
    keys, blocks = rows_by_block(rows)
    radii = _radii(rows)
    lines = [
        [
            [*(names if number == 0 else [""] * len(names)), *cells]
            for number, cells in enumerate(
                _block(of_block, radii, lambda row: _cell(row, intervals, digits))
            )
        ]
        for names, of_block in blocks.items()
    ]
    return Layout([*(BLOCKS[key] for key in keys), "Attack"], radii, lines)


def rows_by_block(rows: Sequence[Row]) -> tuple[list[str], dict[tuple[str, ...], list[Row]]]:
    """(keys of ``BLOCKS`` that the rows have, values of these → the rows of a block)."""
    keys = [key for key in BLOCKS if any(row.get(key) is not None for row in rows)]
    blocks: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        blocks.setdefault(tuple(str(row.get(key) or "") for key in keys), []).append(row)
    return keys, blocks


def _block(
    rows: Sequence[Row], radii: Sequence[float | None], cell: Callable[[Row | None], str]
) -> list[list[str]]:
    at = {(row["attack"], row["eps"]): row for row in rows}
    clean = at.pop((CLEAN, None), None)
    attacks = list(dict.fromkeys(attack for attack, _ in at))
    images = " or ".join(map(str, sorted({row["images"] for row in rows})))
    return [
        [
            attack,
            *((images, cell(clean)) if number == 0 else ("", "")),
            *(cell(at.get((attack, eps))) for eps in radii),
        ]
        for number, attack in enumerate(attacks)
    ]


def _cell(row: Row | None, intervals: bool, digits: int) -> str:
    if row is None or row["least"] is None:
        return NOTHING
    least, most, low, high = (
        f"{100 * float(row[name]):.{digits}f}" for name in ("least", "most", "low", "high")
    )
    text = f"{least} to {most}" if row["undecided"] else least
    return f"{text} [{low}, {high}]" if intervals else text


def _radii(rows: Sequence[Row]) -> list[float | None]:
    """The radii, ascending, and None last if a worst case has none."""
    known = sorted({row["eps"] for row in rows if row["eps"] is not None})
    without = any(row["eps"] is None and row["attack"] != CLEAN for row in rows)
    return [*known, None] if without else known
