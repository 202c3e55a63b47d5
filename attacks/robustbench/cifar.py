"""The test sets of CIFAR-10 and CIFAR-100 as the "python version" of their authors, which
torchvision and RobustBench read, lies on disk.

The files are pickles. They are read by an unpickler that makes arrays, text, bytes, numbers, lists
and dicts, and refuses everything else, so a file can run no code.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32
ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}
"""What makes an array; the last turns text into its bytes, where Python 3 wrote the array."""


class CifarFile(NamedTuple):
    """Where a test set lies, and what it is.

    place: the file below the data folder
    labels: the entry that has the labels
    classes: how many there are
    archive: what to download
    """

    place: str
    labels: str
    classes: int
    archive: str


SOURCE = "https://www.cs.toronto.edu/~kriz"
CIFAR = {
    "cifar10": CifarFile(
        "cifar-10-batches-py/test_batch", "labels", 10, f"{SOURCE}/cifar-10-python.tar.gz"
    ),
    "cifar100": CifarFile(
        "cifar-100-python/test", "fine_labels", 100, f"{SOURCE}/cifar-100-python.tar.gz"
    ),
}


def cifar_test_set(
    name: str, data_dir: Path | str, n_examples: int | None = None
) -> tuple[Tensor, Tensor]:
    """(images (N, 3, 32, 32) float32 in [0, 1], labels (N,) int64), in the order of the file.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: the folder that ``cifar-10-batches-py`` or ``cifar-100-python`` lies in.
        n_examples: the first so many; None, or more than there are: all.

    Raises:
        FileNotFoundError: the file is not there; the message says what to download.
        ValueError: another name, or a file that is no such test set.
    """
    if name not in CIFAR:
        raise ValueError(f"name must be one of {tuple(CIFAR)}, got {name!r}")
    known = CIFAR[name]
    path = Path(data_dir) / known.place
    if not path.is_file():
        raise FileNotFoundError(
            f"data_dir must hold {known.place}, got {str(data_dir)!r} without it: download "
            f"{known.archive} and unpack it there"
        )

    pixels, labels = _checked(path, _unpickled(path), known)
    first = slice(0, n_examples)
    images = torch.from_numpy(pixels[first].copy()).view(-1, 3, SIDE, SIDE)
    return images.float() / 255, torch.tensor(labels[first], dtype=torch.int64)


def _checked(
    path: Path, entries: dict[str, Any], known: CifarFile
) -> tuple[NDArray[np.uint8], list[int]]:
    """(pixels, labels) of a file. ValueError: it has no such entries."""
    pixels: Any = entries.get("data")
    labels: Any = entries.get(known.labels)
    is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_array or pixels.shape[1:] != (3 * SIDE * SIDE,):
        raise ValueError(f"{path} must have images (N, 3072) of uint8 under 'data', got others")
    if not isinstance(labels, list) or not _are_classes(labels, len(pixels), known.classes):
        raise ValueError(
            f"{path} must have a list of {len(pixels)} labels from 0 to {known.classes - 1} under "
            f"{known.labels!r}, got another"
        )
    return pixels, labels


def _are_classes(labels: list[Any], count: int, classes: int) -> bool:
    return len(labels) == count and all(
        isinstance(label, int) and 0 <= label < classes for label in labels
    )


class _ArraysOnly(pickle.Unpickler):
    """It makes arrays beside what needs no class, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _unpickled(path: Path) -> dict[str, Any]:
    """The entries of a file. ValueError: it is no pickle of a dict, or it asks for something else
    than arrays, text, numbers, lists and dicts."""
    with path.open("rb") as file:
        try:
            entries = _ArraysOnly(
                file, encoding="latin1"
            ).load()  # Python 2 wrote the official ones
        except Exception as error:  # a damaged pickle fails in any way
            raise ValueError(f"{path} must be a file of CIFAR, got another: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a dict, got {type(entries).__name__}")
    return entries
