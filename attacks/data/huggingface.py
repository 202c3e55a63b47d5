"""Data sets of Hugging Face's package ``datasets``, as ``save_to_disk`` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ironmoe.attacks.data.columns import find_columns, numbered, picture
from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.image_set import Item, digest


class SavedImages:
    """The images of a ``datasets.Dataset``, in its order. Its files stay on the disk.

    Pictures are decoded here and not by ``datasets``, so they are treated as those of every other
    set. A transform of the data set (``set_transform``) is left out.

    Args:
        dataset: the ``datasets.Dataset``.
        image, label: the columns; None: they are found by their types and usual names.
        name: of the set.
        folder: what the paths of images without bytes are relative to.

    Raises:
        DataError: the columns are not clear, or an image has no label.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image: str | None = None,
        label: str | None = None,
        name: str = "datasets",
        folder: Path | str = ".",
    ) -> None:
        if not len(dataset):
            raise DataError(f"{name} must hold images, got none")
        columns = find_columns(dataset.features.arrow_schema, name, image, label)
        self.name = name
        self.folder = Path(folder)
        self.columns = columns
        self.notes: list[str] = [columns.note] if columns.note else []

        plain = dataset.with_format("arrow")  # it decodes nothing
        labels = plain.select_columns([columns.label])[:].column(0).to_pylist()
        self.labels, self.names = numbered(labels, columns, name)
        self._images = plain.select_columns([columns.image])
        own = (dataset._fingerprint, columns.image, columns.label)
        self.fingerprint = digest([own, *((str(label),) for label in labels)])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int, channels: int) -> Item:
        cell = self._images[number : number + 1].column(0)[0].as_py()
        return picture(cell, int(self.labels[number]), channels, self.where(number), self.folder)

    def where(self, number: int) -> str:
        return f"row {number} of {self.name}"


def saved_dataset(
    path: Path | str,
    *,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> SavedImages:
    """What ``datasets.Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote to a folder.

    Args:
        path: the folder.
        split: of a ``DatasetDict``; it may be left out where there is only one.
        image, label: names of the columns. None: they are found by their types and usual names.

    Raises:
        DataError: ``datasets`` is not installed, there is no such data set, split or column, or an
            image has no label.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data sets that Hugging Face saved are read by datasets: pip install datasets "
            f"({error})"
        ) from error

    path = Path(path)
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} must be a folder that save_to_disk of datasets wrote: {error}"
        ) from error

    name = path.resolve().name
    if isinstance(found, datasets.DatasetDict):
        split = next(iter(found)) if split is None and len(found) == 1 else split
        if split not in found:
            raise DataError(f"split of {path} must be one of {', '.join(found)}, got {split}")
        found = found[split]
        name = f"{name} {split}"
    elif split is not None and str(found.split) != split:
        raise DataError(f"split must be that of {path}, which is {found.split}, got {split!r}")
    return SavedImages(found, image=image, label=label, name=name, folder=path)


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` saved a data set to this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
