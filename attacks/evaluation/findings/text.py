"""A report as a table of plain text, for ``print``."""

from collections.abc import Sequence

from ironmoe.attacks.evaluation.findings.accuracy import Accuracy, share
from ironmoe.attacks.evaluation.findings.flag import (
    NOT_LOOKED_AT,
    TRIPPED,
    Flag,
    counted_states,
    in_state,
)
from ironmoe.attacks.evaluation.findings.radius_text import radius_text
from ironmoe.attacks.evaluation.findings.verdict import Report, radii_of_all, verdict

HEAD = ("attack", "eps", "accuracy", "95 % interval", "undecided")
LEFT = 2  # columns that begin at the left
MOST_NAMED = 10  # skipped images


def as_text(report: Report) -> str:
    """The clean accuracy, each attack at each eps, the worst case, and what the checks say.

    An accuracy is a range, such as "12.5 to 25.0 %", where a budget left images undecided.
    """
    rows = [HEAD, _row("clean", "", report.clean_accuracy)]
    for name, summary in report.attacks.items():
        rows += [_row(name, radius_text(eps), each) for eps, each in summary.curve.items()]
    if len(report.attacks) > 1:
        rows += _worst(report)

    lines = [*_table(rows), verdict(report), *_left_out(report)]
    if report.checks:
        lines.append(f"Checks against false security: {counted_states(report.checks)}.")
    for state in (TRIPPED, NOT_LOOKED_AT):
        lines += [f"- {_said(flag)}" for flag in in_state(report.checks, state)]
    return "\n".join(lines)


def _worst(report: Report) -> list[tuple[str, ...]]:
    radii = radii_of_all(report)
    if not radii:
        return [_row("worst case", "largest", report.worst_case)]
    return [_row("worst case", radius_text(eps), report.worst_case_at(eps)) for eps in radii]


def _row(name: str, eps: str, accuracy: Accuracy) -> tuple[str, ...]:
    low, high = accuracy.interval()
    return (
        name,
        eps,
        share(accuracy),
        f"[{100 * low:.1f}, {100 * high:.1f}]",
        str(accuracy.undecided),
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _left_out(report: Report) -> list[str]:
    skipped = report.skipped
    if not skipped:
        return []
    attacked = report.skipped_under_attack
    clean = sorted({*skipped} - {*attacked})
    lines = [
        f"- {len(numbers)} {when}: number {', '.join(map(str, numbers[:MOST_NAMED]))}"
        + " …" * (len(numbers) > MOST_NAMED)
        for numbers, when in ((clean, "without any attack"), (attacked, "under attack alone"))
        if numbers
    ]
    total = len(skipped) + report.clean_accuracy.total
    return [f"Left out: {len(skipped)} of {total} images, of which nothing finite came.", *lines]


def _said(flag: Flag) -> str:
    return f"{flag.name}: {flag.message}"
