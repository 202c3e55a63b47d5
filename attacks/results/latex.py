"""Accuracies as a LaTeX table (booktabs): one row an attack, one column a radius."""

from collections.abc import Sequence
from typing import cast

from ironmoe.attacks.evaluation.findings.radius_text import radius_text
from ironmoe.attacks.results.accuracies import accuracies
from ironmoe.attacks.results.image_rows import Reports
from ironmoe.attacks.results.layout import laid_out
from ironmoe.attacks.results.left_out import left_out
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
    Where images are left out because nothing finite came of them, lines at the foot say how many,
    and what is left if those fell that an attack drove to NaN.

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
    table = laid_out(rows, intervals=intervals, digits=digits)
    named = len(table.names)

    lines = [
        f"% needs \\usepackage{{booktabs}}. Accuracies in percent{_said(rows, intervals)}",
        f"\\begin{{tabular}}{{{'l' * named}{'r' * (2 + len(table.radii))}}}",
        "\\toprule",
        _line([*table.names, "$n$", "Clean", *map(_radius, table.radii)]),
    ]
    for block in table.blocks:
        lines.append("\\midrule")
        lines += [_line([*map(escaped, cells[:named]), *cells[named:]]) for cells in block]
    foot = left_out(rows)
    lines += ["\\midrule"] * bool(foot)
    lines += [_across(sentence, named + 2 + len(table.radii)) for sentence in foot]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def escaped(text: str) -> str:
    """Text as LaTeX prints it, whatever signs it holds."""
    return "".join(ESCAPED.get(sign, sign) for sign in text)


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


def _across(text: str, columns: int) -> str:
    sentence = rf"\footnotesize {escaped(text)}"
    return _line([rf"\multicolumn{{{columns}}}{{p{{\linewidth}}}}{{{sentence}}}"])


def _line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
