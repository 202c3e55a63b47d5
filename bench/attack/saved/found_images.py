"""The adversarial images of a run, as PNG files or as an .npz for each attack, with an index."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ironmoe.attacks import AttackSummary
from ironmoe.attacks.results.rows_file import Row, rows_as_text
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.saved.npz import write_npz
from ironmoe.bench.attack.saved.png import LEVELS, png
from ironmoe.bench.attack.saved.tables import image_rows
from ironmoe.bench.common.files import slug, write_atomically
from ironmoe.bench.common.user_error import UserError

FOLDER, INDEX = "adversarial", "adversarial/index.csv"
SHOWN = ("number", "row", "label", "prediction", "distance", "attack", "eps")


class SaveError(UserError):
    """The images cannot be saved as asked; the message says what is possible."""


def save_found(folder: Path, outcome: EvaluationOutcome, form: str) -> int:
    """Write every confirmed adversarial image, then the index that names them.

    Each file is there whole or not at all. The same results give the same files.

    Args:
        folder: of the run.
        form: a name in ``FORMS``.

    Returns:
        How many images were written.
    """
    found = [row for row in image_rows(outcome) if row["fell"]]
    index: list[Row] = []
    for attack, name in _folder_names(list(outcome.report.attacks)).items():
        summary = outcome.report.attacks[attack]
        rows = [row for row in found if row["attack"] == attack]
        files = FORMS[form](folder / FOLDER, name, rows, _found(summary))
        index += [
            {key: row[key] for key in SHOWN} | {"file": file, "place": place}
            for row, (file, place) in zip(rows, files, strict=True)
        ]

    (folder / FOLDER).mkdir(exist_ok=True)
    text = rows_as_text(index, ".csv") if index else f"{','.join([*SHOWN, 'file', 'place'])}\n"
    write_atomically(folder / INDEX, text)
    return len(index)


def check_form(form: str | None, shape: Sequence[int], levels: int | None) -> None:
    """Find out before the attacks whether what they find can be saved.

    Args:
        form: a name in ``FORMS``, or None.
        shape: of an image.
        levels: how many values a pixel has; None if any.

    Raises:
        SaveError: it cannot.
    """
    if form is None:
        return
    if form not in FORMS:
        raise SaveError(f"--save-images must be {' or '.join(FORMS)}, got {form!r}")
    if form != "png":
        return
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise SaveError(
            f"--save-images png needs images with 1 or 3 channels, got shape {tuple(shape)}; use "
            "--save-images npz"
        )
    if levels is None or (LEVELS - 1) % (levels - 1):
        raise SaveError(
            f"--save-images png needs --levels {LEVELS}, or another number whose steps a PNG has, "
            f"got {levels}; or use --save-images npz"
        )


def _found(summary: AttackSummary) -> Iterator[Tensor]:
    """The final images that fell, one after another, so that few of them are in memory."""
    for place in summary.fell.nonzero():
        yield summary.final(place)[0]


def _as_png(
    folder: Path, name: str, rows: list[Row], images: Iterator[Tensor]
) -> Iterable[tuple[str, int]]:
    """A file for each image: ATTACK/NUMBER.png."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for row, image in zip(rows, images, strict=True):
        file = f"{name}/{row['number']:05}.png"
        write_atomically(folder / file, png(image))
        yield file, 0


def _as_npz(
    folder: Path, name: str, rows: list[Row], images: Iterator[Tensor]
) -> Iterable[tuple[str, int]]:
    """One file for each attack, ATTACK.npz: images (M, C, S, S) float32, labels (M,), and what the
    index has."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {key: np.array([row[key] for row in rows]) for key in SHOWN if key != "attack"}
    columns["labels"] = columns.pop("label")
    write_npz(folder / f"{name}.npz", columns, images, len(rows))
    return [(f"{name}.npz", place) for place in range(len(rows))]


FORMS: dict[str, Callable[[Path, str, list[Row], Iterator[Tensor]], Iterable[tuple[str, int]]]] = {
    "png": _as_png,
    "npz": _as_npz,
}


def _folder_names(attacks: Sequence[str]) -> dict[str, str]:
    """attack → its name as part of a file's name; a number tells apart those that become alike."""
    names: dict[str, str] = {}
    for attack in attacks:
        plain = slug(attack) or "attack"
        alike = sum(name == plain or name.startswith(f"{plain}~") for name in names.values())
        names[attack] = f"{plain}~{alike + 1}" if alike else plain
    return names
