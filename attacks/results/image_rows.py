"""What every attack did to every image: rows of plain values, whose columns are declared here.

A new column is one entry in ``IMAGE_COLUMNS``: files, comparisons and the command follow.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ironmoe.attacks.engine.counters import SIGNS
from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.results.rows_file import Row, read_text_rows, write_text_rows

Reports = RobustnessReport | Mapping[str, RobustnessReport]


class ImageColumn(NamedTuple):
    """One column of the rows of images.

    name: of the column
    kind: the type of its values, of which each may be None: it does not apply, or is not known
    values: what a summary says of its N images, as a tensor (N,) or N values; None where it says
        nothing
    """

    name: str
    kind: type
    values: Callable[[AttackSummary], Tensor | Sequence[Any] | None]


def _fell_at(summary: AttackSummary) -> list[float | None]:
    return [
        radius if fell else None
        for radius, fell in zip(summary.fell_at.tolist(), summary.fell.tolist(), strict=True)
    ]


def _held_at(summary: AttackSummary) -> list[float | None]:
    """The largest radius at which an image is known to have held."""
    held: list[float | None] = [None] * len(summary.examples)
    for eps in summary.eps:
        known = summary.robust_at(eps) & ~summary.undecided_at(eps)
        held = [eps if now else before for now, before in zip(known.tolist(), held, strict=True)]
    return held


def _part(summary: AttackSummary) -> list[str | None]:
    return [
        summary.stages[passed][1] if fell else None
        for passed, fell in zip(summary.passed.tolist(), summary.fell.tolist(), strict=True)
    ]


def _right_passes(half: int) -> Callable[[AttackSummary], list[list[int]] | None]:
    """Of a random model, how many passes of one half are right: of the clean image, and for each
    radius of the worst point found up to it."""

    def right(summary: AttackSummary) -> list[list[int]] | None:
        if summary.passes == 1:
            return None
        hits = [summary.hits[:, 0], *map(summary.hits_at, summary.eps)]
        counts = summary.passes // 2 - torch.stack(hits, dim=1)[..., half]
        return cast(list[list[int]], counts.tolist())

    return right


def _alike(summary: AttackSummary) -> list[float] | None:
    return None if summary.passes == 1 else [summary.alike] * len(summary.examples)


def _not_negative(numbers: Tensor | None) -> list[int | None] | None:
    """−1 stands for a number that is not there."""
    if numbers is None:
        return None
    return [None if number < 0 else number for number in numbers.tolist()]


def _clean_prediction(summary: AttackSummary) -> list[int | None] | None:
    """Of a skipped image there is none; of one that could not be read it would be that of what
    stands in its place."""
    numbers = _not_negative(summary.per_image.get("clean_prediction"))
    if numbers is None:
        return None
    left_out = summary.skipped.tolist()
    return [None if out else number for number, out in zip(numbers, left_out, strict=True)]


def _flag(sign: str) -> Callable[[AttackSummary], Tensor | None]:
    return lambda summary: summary.flags.get(sign)


IMAGE_COLUMNS: tuple[ImageColumn, ...] = (
    ImageColumn("number", int, lambda summary: summary.examples),
    ImageColumn("label", int, lambda summary: _not_negative(summary.per_image.get("label"))),
    ImageColumn("clean_prediction", int, _clean_prediction),
    ImageColumn("clean_right", bool, lambda summary: summary.clean_correct),
    ImageColumn("fell", bool, lambda summary: summary.fell),
    ImageColumn("decided", bool, lambda summary: summary.decided),
    ImageColumn("skipped", bool, lambda summary: summary.skipped),
    ImageColumn("skipped_under_attack", bool, lambda summary: summary.skipped_under_attack),
    ImageColumn("eps", float, _fell_at),
    ImageColumn("held_at", float, _held_at),
    ImageColumn("part", str, _part),
    ImageColumn("prediction", int, lambda summary: _not_negative(summary.prediction)),
    ImageColumn("distance", float, lambda summary: summary.distance),
    ImageColumn("clean_figure", float, lambda summary: summary.clean_figure),
    ImageColumn("figure", float, lambda summary: summary.figure),
    ImageColumn("steps", int, lambda summary: _not_negative(summary.steps)),
    ImageColumn("found", bool, lambda summary: summary.found),
    ImageColumn("forwards", int, lambda summary: summary.per_image.get("forwards")),
    ImageColumn("backwards", int, lambda summary: summary.per_image.get("backwards")),
    *(ImageColumn(sign, bool, _flag(sign)) for sign in SIGNS),
    ImageColumn("passes", int, lambda summary: [summary.passes] * len(summary.examples)),
    ImageColumn("alike", float, _alike),
    ImageColumn("right_first", list, _right_passes(0)),
    ImageColumn("right_second", list, _right_passes(1)),
    ImageColumn("checksum", int, lambda summary: _not_negative(summary.per_image.get("checksum"))),
)

# The command adds ``row``, the image's place in the data that were loaded.
KINDS: dict[str, type] = {column.name: column.kind for column in IMAGE_COLUMNS} | {"row": int}


def per_image(reports: Reports) -> list[Row]:
    """One row for each attack and image, in the order of the attacks and of the data.

    The columns:

    - ``model``: its name, where several reports are given
    - ``attack``: its name
    - ``number``: the image's number in the data
    - ``label``, ``clean_prediction``: classes
    - ``clean_right``: the clean prediction is right
    - ``fell``, ``eps``, ``part``: the image fell, at which radius, to which part of an ensemble;
      radii and distances are in the units of the attack's ``bounds``
    - ``held_at``: the largest radius at which it held against the whole attack
    - ``decided``: nothing was left to do when the evaluation ended
    - ``skipped``: nothing finite came of the image, so it is left out of every accuracy
    - ``skipped_under_attack``: it is skipped, but the model is finite there without an attack: this
      attack drove it to NaN or infinity, at the first radius above ``held_at``
    - ``prediction``, ``distance``: of the final image
    - ``clean_figure``, ``figure``: the goal's figure for the clean and for the final image
    - ``steps``: how many queries came before the success
    - ``found``: the search saw a success, which full precision may not have confirmed
    - ``forwards``, ``backwards``: passes of the model that the image took part in
    - one column for each of the flags of ``AttackResult``
    - ``passes``: how many passes of the model each verdict rests on; more than 1 if it is random
    - ``alike``: of a random model, how many times as much a pass varies as one whose images draw
      for themselves; above 1 for a model that draws once for a whole batch
    - ``right_first``, ``right_second``: of a random model, in how many passes of the first and of
      the second half the image is right: a list, of the clean image, and for each radius of the
      worst point found up to it. The first half chooses that point, the second one counts
    - ``checksum``: the CRC-32 of the image, its label and its further inputs

    What does not apply is None: ``eps`` of an image that held, ``label`` of one without a class.

    Args:
        reports: what ``evaluate`` returned, or model → report for several models.
    """
    if isinstance(reports, RobustnessReport):
        return _rows_of(reports)
    return [
        {"model": model} | row
        for model, report in by_model(reports).items()
        for row in _rows_of(report)
    ]


def by_model(reports: Reports) -> Mapping[str | None, RobustnessReport]:
    """Model → report; None → a report that is given alone.

    Raises:
        TypeError: something else than reports.
    """
    alone = isinstance(reports, RobustnessReport)
    named: Any = {None: reports} if alone else reports
    is_named = isinstance(named, Mapping)
    if not is_named or not all(isinstance(one, RobustnessReport) for one in named.values()):
        raise TypeError(
            "reports must be what evaluate returned, or a dict model → report, got "
            f"{type(reports).__name__}"
        )
    return dict(named)


def write_rows(reports: Reports, path: Path | str) -> None:
    """Write ``per_image(reports)`` as CSV (".csv") or as JSON lines (".jsonl").

    Raises:
        ValueError: the path ends in something else.
    """
    write_text_rows(per_image(reports), path)


def read_rows(path: Path | str) -> list[Row]:
    """The rows that ``write_rows`` wrote, with the same values and types.

    Raises:
        ValueError: the file is no such file.
    """
    return read_text_rows(path, KINDS)


def _rows_of(report: RobustnessReport) -> list[Row]:
    return [
        row for name, summary in report.attacks.items() for row in _rows_of_attack(name, summary)
    ]


def _rows_of_attack(attack: str, summary: AttackSummary) -> list[Row]:
    count = len(summary.examples)
    columns = [_plain(column.values(summary), count) for column in IMAGE_COLUMNS]
    names = [column.name for column in IMAGE_COLUMNS]
    return [
        {"attack": attack} | dict(zip(names, values, strict=True))
        for values in zip(*columns, strict=True)
    ]


def _plain(values: Tensor | Sequence[Any] | None, count: int) -> Sequence[Any]:
    """N values; None where a number is not finite, for which JSON has no sign."""
    if values is None:
        return [None] * count
    plain = values.tolist() if isinstance(values, Tensor) else values
    return [None if isinstance(each, float) and not isfinite(each) else each for each in plain]
