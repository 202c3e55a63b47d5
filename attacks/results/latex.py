"""Accuracies as a LaTeX table (booktabs): one row an attack, one column a radius."""

from collections.abc import Callable, Sequence
from typing import cast

from ironmoe.attacks.evaluation.findings.radius_text import radius_text
from ironmoe.attacks.results.accuracies import accuracies
from ironmoe.attacks.results.image_rows import Reports
from ironmoe.attacks.results.outcomes import CLEAN
from ironmoe.attacks.results.rows_file import Row

ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # after a line's end, LaTeX would read it as the beginning of a length,
    "*": "{*}",  # and this as a part of the line's end
    "\n": " ",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
NOTHING = "--"
# What tells the blocks of a table apart: the key of a row, and the head of its column.
BLOCKS = {"model": "Model", "data": "Data", "norm": "Norm"}


def latex_table(
    reports: Reports | Sequence[Row],
    *,
    intervals: bool = True,
    digits: int = 1,
    confidence: float = 0.95,
) -> str:
    r"""A ``tabular`` with the accuracies of one or several reports, in percent.

    It needs ``\usepackage{booktabs}``. Where a budget left images undecided, an accuracy is a
    range, such as 12.5 to 25.0: if all of them fall, and if all hold. $n$ is how many images count.

    Args:
        reports: what ``evaluate`` returned, or model → report for several models; or rows of
            ``accuracies``, which may have "data" and "norm" beside "model".
        intervals: write the Wilson interval after each accuracy.
        digits: decimal places of the percentages.
        confidence: that of the intervals, where reports are given. Rows have their own.

    Raises:
        ValueError: a confidence that does not lie between 0 and 1, or no rows.
    """
    if isinstance(reports, Sequence) and all(isinstance(row, dict) for row in reports):
        rows = list(reports)
    else:
        rows = accuracies(cast(Reports, reports), confidence=confidence)
    if not rows:
        raise ValueError("reports must hold at least one accuracy, got none")

    keys = [key for key in BLOCKS if any(row.get(key) is not None for row in rows)]
    radii = _radii(rows)
    head = [*(BLOCKS[key] for key in keys), "Attack", "$n$", "Clean", *map(_radius, radii)]

    lines = [
        f"% needs \\usepackage{{booktabs}}. Accuracies in percent{_said(rows, intervals)}",
        f"\\begin{{tabular}}{{{'l' * (len(keys) + 1)}{'r' * (2 + len(radii))}}}",
        "\\toprule",
        _line(head),
    ]
    for block in dict.fromkeys(tuple(row.get(key) for key in keys) for row in rows):
        of_block = [row for row in rows if tuple(row.get(key) for key in keys) == block]
        cells_of_block = _block(of_block, radii, lambda row: _cell(row, intervals, digits))
        for number, cells in enumerate(cells_of_block):
            names = [escaped(str(name or "")) if number == 0 else "" for name in block]
            lines += ["\\midrule"] * (number == 0)
            lines.append(_line([*names, *cells]))

    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def escaped(text: str) -> str:
    """Text as LaTeX prints it, whatever signs it holds."""
    return "".join(ESCAPED.get(sign, sign) for sign in text)


def _block(
    rows: Sequence[Row], radii: Sequence[float | None], cell: Callable[[Row | None], str]
) -> list[list[str]]:
    """The cells of one model, a list for each attack; the number of images and the clean accuracy
    stand in the first."""
    at = {(row["attack"], row["eps"]): row for row in rows}
    clean = at.pop((CLEAN, None), None)
    attacks = list(dict.fromkeys(attack for attack, _ in at))
    images = " or ".join(map(str, sorted({row["images"] for row in rows})))
    return [
        [
            escaped(attack),
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


def _radius(eps: float | None) -> str:
    if eps is None:
        return "each at its largest $\\varepsilon$"
    return f"$\\varepsilon = {radius_text(eps)}$"


def _said(rows: Sequence[Row], intervals: bool) -> str:
    images = sorted({row["images"] for row in rows})
    text = f" of {' or '.join(map(str, images))} images"
    if intervals:
        kinds = sorted({row["confidence"] for row in rows})
        text += f", with {' or '.join(f'{100 * each:g}' for each in kinds)} \\% Wilson intervals"
    if any(row["passes"] > 1 for row in rows):
        text += "; of random models, the expected ones of a pass"
    if any(row["undecided"] for row in rows):
        text += "; ranges where a budget left images undecided"
    return text


def _line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
