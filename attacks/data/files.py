"""Image files with labels: a folder with one sub-folder a class, or a list of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ironmoe.attacks.data.decoding import SUFFIXES, read_image
from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.image_set import Item, digest


class ImageFiles:
    """Files in a given order, each with its label.

    Args:
        name: of the set.
        folder: what ``files`` are relative to.
        files: paths below the folder.
        labels: one for each file.
        names: of the classes; None: labels are indices of the logits.
        notes: what people should know.
        as_stored: see ``read_image``.

    Raises:
        DataError: there are no files, or one of them does not exist.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        files: Sequence[str],
        labels: Sequence[int],
        names: list[str] | None,
        notes: Sequence[str] = (),
        *,
        as_stored: bool = False,
    ) -> None:
        if not files:
            raise DataError(f"{folder} must hold images, got none")
        self.name = name
        self.folder = folder
        self.files = list(files)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.names = names
        self.notes = list(notes)
        self.as_stored = as_stored
        self.fingerprint = digest(self._lines())

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int, channels: int) -> Item:
        file = self.folder / self.files[number]
        picture = read_image(file, channels, as_stored=self.as_stored)
        return Item(picture, int(self.labels[number]))

    def where(self, number: int) -> str:
        return str(self.folder / self.files[number])

    def _lines(self) -> list[tuple[str, int, str]]:
        """Of each file its path, size and class. A copy of the folder elsewhere has the same."""
        names = self.names
        return [
            (file, _size(self.folder / file), str(label) if names is None else names[label])
            for file, label in zip(self.files, self.labels.tolist(), strict=True)
        ]


def image_folder(folder: Path | str) -> ImageFiles:
    """A folder with one sub-folder a class: class by class, files by name.

    Raises:
        DataError: there is no such folder, no sub-folder, or one of them holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"a folder of images must exist, got {folder}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(
            f"{folder} must hold one sub-folder for each class, got none. Images without "
            "sub-folders need a table of their labels, such as labels.csv in the folder"
        )

    files: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(names):
        found = sorted(entry.name for entry in os.scandir(folder / name) if not entry.is_dir())
        images = [file for file in found if is_image(file)]
        if not images:
            raise DataError(_no_images(folder / name))
        others.update(_kind(file) for file in found if not is_image(file))
        files += [f"{name}/{file}" for file in images]
        labels += [label] * len(images)

    return ImageFiles(folder.resolve().name, folder, files, labels, names, _left_out(others))


def is_image(file: str) -> bool:
    """Whether the name ends as that of an image does. Hidden files are none."""
    return not file.startswith(".") and _ending(file) in SUFFIXES


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _kind(file: str) -> str:
    """Of what kind a file is that is left out."""
    return "hidden" if file.startswith(".") else _ending(file) or "no ending"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"image {file} must exist: {error}") from error


def _no_images(folder: Path) -> str:
    inner = next((p for p in sorted(folder.iterdir()) if p.is_dir()), None)
    deeper = "" if inner is None else f". It holds folders: are the classes those in {folder}?"
    return (
        f"class folder {folder} must hold images ({', '.join(sorted(SUFFIXES))}), got none{deeper}"
    )


def _left_out(others: Counter[str]) -> list[str]:
    """A sentence about files that are no images by their names."""
    if not others:
        return []
    kinds = ", ".join(f"{count} × {kind}" for kind, count in others.most_common(5))
    return [f"Left out, since their names are not those of images: {kinds}."]
