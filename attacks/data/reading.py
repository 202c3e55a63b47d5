"""What a worker process does: images of a set become pixels, which it hands over side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import ImageSet

if TYPE_CHECKING:
    from PIL import Image


class Pipeline(Protocol):
    """From a picture to the pixels that a model sees, such as ``Preprocessing``.

    channels: 1 for grey, 3 for RGB.
    size: (height, width) of the pixels; None: that depends on the picture.
    as_dict: what it does, as JSON; str() says it in a line for people.
    """

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> tuple[int, int] | None: ...

    def __call__(self, picture: Image.Image) -> Tensor: ...

    def as_dict(self) -> dict[str, Any]: ...


class Read(NamedTuple):
    """One image: pixels (C, H, W) and its label; or why it cannot be read; or why the whole set is
    refused."""

    place: int
    pixels: Tensor | None = None
    label: int = -1
    error: str | None = None
    refused: str | None = None


class Kind(NamedTuple):
    """Of what kind the image at a place is."""

    place: int
    shape: torch.Size
    dtype: torch.dtype


class ReadTogether(NamedTuple):
    """Some images as a worker hands them over.

    places, labels, errors: one entry an image. pixels (r, C, H, W): of those that can be read; one
    tensor of all, since each tensor that leaves a worker takes a file descriptor. None: no image
    can be read, or they are of several kinds. kinds: the first image of each kind. refused: why the
    set cannot be used.
    """

    places: list[int]
    labels: list[int]
    errors: list[str | None]
    pixels: Tensor | None
    kinds: list[Kind]
    refused: str | None


class Reading(Dataset[Read]):
    """What a worker does for one place of the stream. It is all that is sent to a worker."""

    def __init__(self, images: ImageSet, pipeline: Pipeline, rows: Tensor) -> None:
        self.images = images
        self.pipeline = pipeline
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Read:
        """The errors travel as words: a worker would add its traceback to an exception."""
        row = int(self.rows[place])
        try:
            image, label = self.images.read(row, self.pipeline.channels)
            return Read(place, self._pixels(image, row), label)
        except UnreadableImage as error:
            return Read(place, error=str(error))
        except DataError as error:
            return Read(place, refused=str(error))

    def _pixels(self, image: object, row: int) -> Tensor:
        """Pixels of a picture by the pipeline. An array of the size that it makes needs nothing
        more."""
        if not isinstance(image, Tensor):
            return self.pipeline(image)  # type: ignore[arg-type]
        size = self.pipeline.size
        is_right = size is not None and tuple(image.shape[1:]) == tuple(size)
        if is_right or getattr(self.pipeline, "changes_nothing", False):
            return image
        if image.dtype != torch.uint8:
            raise DataError(
                f"{self.images.where(row)} must have the size that {self.pipeline} makes, since "
                f"floats are not resized, got {image.shape[1]} × {image.shape[2]}; leave out "
                "what resizes and crops (a command's --image-size, --resize and --crop) to take "
                "them as they are"
            )

        from PIL import Image

        values = image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0)
        return self.pipeline(Image.fromarray(values.numpy()))


def side_by_side(read: Sequence[Read]) -> ReadTogether:
    """What was read, as one."""
    good = [(one.place, one.pixels) for one in read if one.pixels is not None]
    kinds: dict[tuple[torch.Size, torch.dtype], Kind] = {}
    for place, pixels in good:
        kinds.setdefault((pixels.shape, pixels.dtype), Kind(place, pixels.shape, pixels.dtype))

    return ReadTogether(
        places=[one.place for one in read],
        labels=[one.label for one in read],
        errors=[one.error for one in read],
        pixels=torch.stack([pixels for _, pixels in good]) if len(kinds) == 1 else None,
        kinds=list(kinds.values()),
        refused=next((one.refused for one in read if one.refused is not None), None),
    )
