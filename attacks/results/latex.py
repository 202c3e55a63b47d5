"""Accuracies as a LaTeX table (booktabs): one row an attack, one column a radius."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

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


def latex_table(
    reports: Reports | Sequence[Row],
    *,
    intervals: bool = True,
    digits: int = 1,
    confidence: float = 0.95,
) -> str:
    r"""A ``tabular`` with the accuracies of one or several reports, in percent.

    It needs ``\usepackage{booktabs}``. ≤ stands before an accuracy that counts undecided images as
    right; its interval reaches down to where all of them fall.

    Args:
        reports: what ``evaluate`` returned, or model → report for several models; or rows of
            ``accuracies``.
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

    models = list(dict.fromkeys(row["model"] for row in rows))
    radii = _radii(rows)
    names = ["Model", "Attack"] if models != [None] else ["Attack"]

    lines = [
        f"% needs \\usepackage{{booktabs}}. Accuracies in percent{_said(rows, intervals)}",
        f"\\begin{{tabular}}{{{'l' * len(names)}{'r' * (1 + len(radii))}}}",
        "\\toprule",
        _line([*names, "Clean", *map(_radius, radii)]),
    ]
    for model in models:
        of_model = [row for row in rows if row["model"] == model]
        block = _block(of_model, radii, lambda row: _cell(row, intervals, digits))
        for number, cells in enumerate(block):
            name = escaped(model or "") if number == 0 else ""
            lines += ["\\midrule"] * (number == 0)
            lines.append(_line([name, *cells] if len(names) == 2 else cells))

    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def escaped(text: str) -> str:
    """Text as LaTeX prints it, whatever signs it holds."""
    return "".join(ESCAPED.get(sign, sign) for sign in text)


def _block(
    rows: Sequence[Row], radii: Sequence[float | None], cell: Callable[[Row | None], str]
) -> list[list[str]]:
    """The cells of one model, a list for each attack; the clean accuracy stands in the first."""
    at = {(row["attack"], row["eps"]): row for row in rows}
    clean = at.pop((CLEAN, None), None)
    attacks = list(dict.fromkeys(attack for attack, _ in at))
    return [
        [
            escaped(attack),
            cell(clean) if number == 0 else "",
            *(cell(at.get((attack, eps))) for eps in radii),
        ]
        for number, attack in enumerate(attacks)
    ]


def _cell(row: Row | None, intervals: bool, digits: int) -> str:
    if row is None or row["accuracy"] is None:
        return NOTHING
    share, low, high = (
        f"{100 * float(row[name]):.{digits}f}" for name in ("accuracy", "low", "high")
    )
    text = f"$\\leq$ {share}" if row["undecided"] else share
    return f"{text} [{low}, {high}]" if intervals else text


def _radii(rows: Sequence[Row]) -> list[float | None]:
    """The radii, ascending, and None last if a worst case has none."""
    known = sorted({row["eps"] for row in rows if row["eps"] is not None})
    without = any(row["eps"] is None and row["attack"] != CLEAN for row in rows)
    return [*known, None] if without else known


def _radius(eps: float | None) -> str:
    """The shortest text that stands for exactly this radius: 8/255, or 0.5."""
    if eps is None:
        return "each at its largest $\\varepsilon$"
    decimal = np.format_float_positional(eps, trim="-")
    numerator = np.format_float_positional(float(f"{255 * eps:g}"), trim="-")
    is_fraction = float(numerator) / 255 == eps and len(f"{numerator}/255") < len(decimal)
    return f"$\\varepsilon = {f'{numerator}/255' if is_fraction else decimal}$"


def _said(rows: Sequence[Row], intervals: bool) -> str:
    images = sorted({row["images"] for row in rows})
    text = f" of {' or '.join(map(str, images))} images"
    if intervals:
        kinds = sorted({row["confidence"] for row in rows})
        text += f", with {' or '.join(f'{100 * each:g}' for each in kinds)} \\% Wilson intervals"
    if any(row["passes"] > 1 for row in rows):
        text += "; of random models, the expected ones of a pass"
    return text


def _line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
