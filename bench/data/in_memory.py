"""Images that are all in memory, as float32 in [0, 1]: to train on, and to study."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.data import (
    DataError,
    ImageArrays,
    ImageSet,
    ImageStream,
    Preprocessing,
    UnreadableImage,
)
from ironmoe.attacks.data.decoding import is_grey, pillow
from ironmoe.attacks.data.files import ImageFiles
from ironmoe.attacks.data.reading import Pipeline
from ironmoe.bench.data.built_in import checksum_of
from ironmoe.bench.data.floats import rules_for
from ironmoe.bench.data.sets import SKIP_BAD, open_set
from ironmoe.bench.data.split import stratified

DEFAULT_FOLDER_SIZE = 32
LARGEST_KEPT_SIZE = 64
TRIED = 64  # images that may be unreadable before one that tells the size
LARGEST_BYTES = 16_000_000_000
"""Images that take more in memory are refused before any of them is read."""


@dataclass
class ImageData:
    """images (N, channels, H, W) float32 in [0, 1]; labels (N,) int64; classes: their names;
    skipped: files that were left out because they cannot be read; notes: what people should
    know; named: the classes have names, else labels are indices of the logits."""

    name: str
    images: Tensor
    labels: Tensor
    classes: list[str]
    skipped: list[str]
    notes: list[str] = field(default_factory=list)
    named: bool = True

    @property
    def checksum(self) -> str:
        """SHA-256 of images and labels as they are used."""
        return checksum_of(self.images, self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        height, width = self.images.shape[2:]
        return height, width

    def as_set(self) -> ImageArrays:
        """The same images as a set that streams."""
        arrays = ImageArrays(
            self.name,
            self.images.numpy(),
            self.labels.numpy(),
            fingerprint=self.checksum,
            origin=self.name,
        )
        arrays.names = self.classes if self.named else None
        arrays.notes = self.notes
        return arrays

    def split(self) -> tuple[Tensor, Tensor]:
        """(train indices, test indices): see ``stratified``."""
        return stratified(self.labels, self.classes)


def load_data(
    spec: str,
    image_size: int | None = None,
    skip_bad: bool = False,
    *,
    labels: Path | None = None,
    pipeline: Pipeline | None = None,
) -> ImageData:
    """Load a set into memory.

    Args:
        spec: see ``open_set``.
        image_size: side in pixels that pictures are resized to; see ``--image-size``. Beside a
            pipeline it must be the pipeline's.
        skip_bad: leave out images that cannot be read.
        labels: a table of labels for a flat folder.
        pipeline: how a model wants its pictures; None: their centre square, see ``square_of``.

    Raises:
        DataError: the data cannot be used.
    """
    side = image_size
    if pipeline is not None and side is not None and pipeline.size != (side, side):
        raise DataError(
            f"--image-size is for models that say nothing of their images, and this one takes "
            f"{pipeline}, got {image_size}"
        )
    images = open_set(spec, labels)
    if images.names is not None and len(images.names) < 2:
        got = ", ".join(images.names) or "none"
        raise DataError(f"{spec} must hold images of at least 2 classes, got {got}")
    rules = square_of(images, image_size) if pipeline is None else rules_for(images, pipeline)
    stream = ImageStream(images, rules, skip_bad=skip_bad)
    _check_memory(stream)

    try:
        read = list(stream)
    except UnreadableImage as error:
        raise DataError(f"{error} ({SKIP_BAD})") from error
    skipped = [stream.where(place) for place in sorted(stream.unread)]
    if not read:
        raise DataError(f"{spec} must hold images that can be read, got none")
    whole = torch.cat([part for part, _ in read])
    found = torch.cat([part for _, part in read])
    if pipeline is None and whole.shape[2] != whole.shape[3]:
        raise DataError(
            f"images of {spec} must be square for the models of this command, got shape "
            f"{tuple(whole.shape[1:])}"
        )
    classes, notes = _classes(images, found)
    return ImageData(
        name=images.name,
        images=whole,
        labels=found,
        classes=classes,
        skipped=skipped,
        notes=[*images.notes, *notes],
        named=images.names is not None,
    )


def square_of(images: ImageSet, image_size: int | None = None) -> Preprocessing:
    """The centre square of each picture, for a model that says nothing of its own.

    Without ``image_size`` the side is that of the first picture if this is small and square, else
    32 pixels; arrays and tensors stay as they are. Pictures are RGB if one of them is.
    """
    channels, size, is_picture = _look(images)
    if image_size is None and not is_picture:
        return Preprocessing(channels=channels)
    small_square = size[0] == size[1] <= LARGEST_KEPT_SIZE
    side = image_size or (size[0] if small_square else DEFAULT_FOLDER_SIZE)
    return Preprocessing(
        channels=channels,
        resize=(side, side),
        mode="square",
        interpolation="bicubic",
        source="" if image_size else "assumed, since the model does not say; see --image-size",
    )


def _look(images: ImageSet) -> tuple[int, tuple[int, int], bool]:
    """(channels, (height, width) of the first image that can be read, whether images are pictures
    and not arrays)."""
    if isinstance(images, ImageArrays):
        _, channels, height, width = images.images.shape
        return channels, (height, width), False
    if not isinstance(images, ImageFiles):
        image = _first_image(images)
        if isinstance(image, Tensor):
            return 3, (image.shape[1], image.shape[2]), False
        return 3, (image.height, image.width), True

    size = None
    channels = 1
    for number in range(len(images)):
        try:
            with pillow().open(images.where(number)) as file:
                size = size or (file.height, file.width)
                channels = channels if is_grey(file) else 3
        except (OSError, SyntaxError, ValueError):
            continue  # whoever reads it says so
        if channels == 3:
            break
    return channels, size or (DEFAULT_FOLDER_SIZE, DEFAULT_FOLDER_SIZE), True


def _first_image(images: ImageSet) -> Any:
    """The first of some images that can be read."""
    for number in range(min(TRIED, len(images))):
        try:
            return images.read(number, 3).image
        except UnreadableImage as error:
            reason = str(error)
    raise DataError(f"data {images.name!r} must hold images that can be read, got none: {reason}")


def _check_memory(stream: ImageStream) -> None:
    size = stream.pipeline.size
    if size is None:
        return
    needed = 4 * len(stream) * stream.pipeline.channels * size[0] * size[1]
    if needed > LARGEST_BYTES:
        raise DataError(
            f"this command holds all images in memory: {len(stream)} of {size[0]} × {size[1]} "
            f"pixels need {needed / 1e9:.0f} GB of at most {LARGEST_BYTES / 1e9:.0f}; take fewer, "
            "or a smaller --image-size. ironmoe attack takes any number"
        )


def _classes(images: ImageSet, labels: Tensor) -> tuple[list[str], list[str]]:
    """(names of the classes by label, what there is to say of them).

    DataError: a label below 0, images of one class alone, or a named class without an image that
    can be read.
    """
    if images.names is not None:
        empty = [name for i, name in enumerate(images.names) if not bool((labels == i).any())]
        if empty:
            raise DataError(
                f"class {empty[0]!r} of {images.name} must hold images that can be read, got none"
            )
        return images.names, []
    if int(labels.min()) < 0:
        raise DataError(
            f"labels of {images.name} must be indices of classes, 0 and above, got "
            f"{int(labels.min())} … {int(labels.max())}"
        )

    found = labels.unique().tolist()
    if len(found) < 2:
        raise DataError(
            f"{images.name} must hold images of at least 2 classes, got {len(labels)} of class "
            f"{found[0]} alone"
        )

    count = int(labels.max()) + 1
    missing = count - len(found)
    note = (
        f"Labels are indices of the logits: {missing} of the {count} classes, 0 … {count - 1}, "
        "have no image."
    )
    return [str(number) for number in range(count)], [note] * (missing > 0)
