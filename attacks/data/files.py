"""Image files with labels: a folder with one sub-folder a class, or a list of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ironmoe.attacks.data.decoding import SUFFIXES, read_image
from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.image_set import Item, digest

INNER = "images"
"""A folder of this name may hold all images of its class, as in Tiny ImageNet. Where they all lie
in other inner folders, it is these that seem to be the classes, as in train/cat."""


class ImageFiles:
    """Files in a given order, each with its label. One that is not there, such as a link to
    nowhere, is an image that cannot be read.

    Args:
        name: of the set.
        folder: what ``files`` are relative to.
        files: paths below the folder.
        labels: one for each file.
        names: of the classes; None: labels are indices of the logits.
        notes: what people should know.
        as_stored: see ``read_image``.

    Raises:
        DataError: there are no files.
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
    """A folder with one sub-folder a class: class by class, files by name, those in deeper folders,
    too.

    Raises:
        DataError: there is no such folder, no sub-folder, or one of them holds no images, or only
            in inner folders that are not called "images".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"a folder of images must exist, got {folder}")
    names = class_names(folder)
    if not names:
        raise DataError(
            f"{folder} must hold one sub-folder for each class, got none. Images without "
            "sub-folders need a table of their labels, such as labels.csv in the folder"
        )

    files: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(names):
        found = files_below(folder / name)
        images = [file for file in found if is_image(os.path.basename(file))]
        if not any("/" not in file or file.startswith(f"{INNER}/") for file in images):
            raise DataError(_no_images(folder / name))
        kinds = (os.path.basename(file) for file in found)
        others.update(_kind(file) for file in kinds if not is_image(file))
        files += [f"{name}/{file}" for file in images]
        labels += [label] * len(images)

    beside = sum(is_image(entry.name) and not entry.is_dir() for entry in os.scandir(folder))
    notes = [*_left_out(others), *_beside(beside)]
    return ImageFiles(folder.resolve().name, folder, files, labels, names, notes)


def class_names(folder: Path) -> list[str]:
    """The sub-folders of a folder, by their names, without hidden ones."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def files_below(folder: Path) -> list[str]:
    """The files in a folder and in those below it, as paths from there, by their names. Links are
    followed, but into no folder that they lie in; hidden folders are left out."""
    return sorted(_files_below(folder, "", frozenset()))


def _files_below(folder: Path, place: str, around: frozenset[tuple[int, int]]) -> Iterator[str]:
    known = folder.stat()
    itself = (known.st_dev, known.st_ino)
    if itself in around:
        return
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield place + entry.name
        elif not entry.name.startswith("."):
            inner = f"{place}{entry.name}/"
            yield from _files_below(Path(entry.path), inner, around | {itself})


def is_image(file: str) -> bool:
    """Whether the name ends as that of an image does. Hidden files are none."""
    return not file.startswith(".") and _ending(file) in SUFFIXES


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _kind(file: str) -> str:
    """Of what kind a file is that is left out."""
    return "hidden" if file.startswith(".") else _ending(file) or "no ending"


def _size(file: Path) -> int:
    """In bytes; −1: nobody can tell, and whoever reads the file says why."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


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


def _beside(count: int) -> list[str]:
    """A sentence about images in no class folder."""
    note = f"{count} images are left out, because they lie beside the class folders."
    return [note] * (count > 0)
