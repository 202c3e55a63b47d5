"""The images that a table leaves out, and what they would make of it, in sentences below it."""

from collections.abc import Callable, Sequence

from ironmoe.attacks.evaluation.findings.radius_text import radius_text
from ironmoe.attacks.results.layout import rows_by_block
from ironmoe.attacks.results.outcomes import CLEAN, WORST_CASE
from ironmoe.attacks.results.rows_file import Row


def left_out(rows: Sequence[Row], radius: Callable[[float], str] = radius_text) -> list[str]:
    """One or two sentences for each block of rows of ``accuracies`` that leaves out images: how
    many, and what is left if those count as fallen that an attack drove to NaN.

    Args:
        radius: how a radius is written.
    """
    keys, blocks = rows_by_block(rows)
    sentences = []
    for names, block in blocks.items():
        model = f"{names[keys.index('model')]}: " if "model" in keys else ""
        sentences += [model + sentence for sentence in _of_block(block, radius)]
    return sentences


def _of_block(rows: Sequence[Row], radius: Callable[[float], str]) -> list[str]:
    first = rows[0]
    skipped, driven = first.get("skipped") or 0, first.get("skipped_under_attack") or 0
    if not skipped:
        return []
    reasons = [
        f"{count} as {why}"
        for count, why in (
            (skipped - driven, "unreadable or not finite without any attack"),
            (driven, "not finite under attack alone"),
        )
        if count
    ]
    verb = "is" if skipped == 1 else "are"
    total = first["images"] + skipped
    said = [f"{skipped} of {total} images {verb} left out, {' and '.join(reasons)}."]
    return [*said, _if_they_fell(rows, driven, radius)] if driven else said


def _if_they_fell(rows: Sequence[Row], driven: int, radius: Callable[[float], str]) -> str:
    """The last attack of a block is the worst case, or the only one."""
    last = rows[-1]["attack"]
    clean = next(_share(row) for row in rows if row["attack"] == CLEAN)
    held = [
        f"{_share(row)} at {'the largest eps' if row['eps'] is None else radius(row['eps'])}"
        for row in rows
        if row["attack"] == last
    ]
    these = "this one" if driven == 1 else f"these {driven}"
    where = "in the worst case" if last.startswith(WORST_CASE) else f"under {last}"
    return (
        f"With {these} counted as fallen, {clean} of {rows[0]['images'] + driven} images are right "
        f"without an attack, and {', '.join(held)} {where}."
    )


def _share(row: Row) -> str:
    least, most = (f"{100 * float(row[f'{end}_if_skipped_fell']):.1f}" for end in ("least", "most"))
    return f"{least} %" if least == most else f"{least} to {most} %"
