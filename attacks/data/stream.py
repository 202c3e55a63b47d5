"""A stream of images: decoded by worker processes, a few batches ahead of whoever takes them.

Images stay 8-bit numbers until they are on the device, and no more of them are in memory than the
workers are ahead. What comes out depends on neither the number of workers nor the batches.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import ImageSet

if TYPE_CHECKING:
    from PIL import Image

READ_TOGETHER = 32  # images that a worker hands over at once
MOST_WORKERS = 8
AHEAD = 2  # batches that each worker is ahead, at least
WORTH_WORKERS = 256  # images; fewer are read before a worker has started


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


class StreamBatch(NamedTuple):
    """Some images of a stream.

    places (n,) int64: where they are in it; images (n, C, H, W), uint8 or float32 in [0, 1], on
    CPU; labels (n,) int64; readable (n,) bool: the others are black, and nothing is known of them.
    """

    places: Tensor
    images: Tensor
    labels: Tensor
    readable: Tensor

    def pixels(self, device: torch.device | str | None = None) -> Tensor:
        """(n, C, H, W) float32 in [0, 1] on ``device``; 8-bit numbers travel there as they are."""
        images = self.images if device is None else self.images.to(device, non_blocking=True)
        return images.float().div_(255) if images.dtype == torch.uint8 else images


class ImageStream:
    """Images of a set as a model sees them; ``evaluate`` takes it as its data.

    A loop over the stream gives (images (n, C, H, W) float32 in [0, 1], labels (n,) int64) of
    images that can be read. ``evaluate`` asks for places, so that each process reads its own
    share alone.

    Args:
        images: the set.
        pipeline: makes pixels of pictures. Arrays of the size that it makes are taken as they are.
        rows: which images of the set, in this order; None: all.
        logits: (L,) int64, for each label of the set the index of the model's logit; −1: the model
            has none. None: labels are indices already.
        workers: how many processes decode; 0: this one does. None: one for each core, at most 8;
            none for a few images.
        skip_bad: images that cannot be read are passed over, in place of an error. ``unread`` names
            them.
        finish: what becomes of a batch of pixels, such as rounding to a grid.

    Attributes:
        unread: place → why this image could not be read, of those that came so far.
        waited: the seconds that takers waited for images so far, after the first batch.

    Raises:
        UnreadableImage: while reading, an image that cannot be read.
        DataError: while reading, images of other sizes than each other, or a label that is no
            logit of the model.
    """

    def __init__(
        self,
        images: ImageSet,
        pipeline: Pipeline,
        *,
        rows: Tensor | None = None,
        logits: Tensor | None = None,
        workers: int | None = None,
        skip_bad: bool = False,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if workers is not None and workers < 0:
            raise DataError(f"workers must be at least 0, got {workers}")
        self.images = images
        self.pipeline = pipeline
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.logits = logits
        self.workers = workers
        self.skip_bad = skip_bad
        self.finish = finish
        self.unread: dict[int, str] = {}
        self.waited = 0.0
        self._first: _Read | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.read(torch.arange(len(self))):
            good = batch.readable
            if bool(good.any()):
                yield batch.pixels()[good], batch.labels[good]

    def read(self, places: Tensor, ahead: int = 0) -> Iterator[StreamBatch]:
        """The images at these places (n,), in this order, in batches.

        ahead: how many images the workers are to be ahead, if they can.
        """
        workers = self._workers(len(places))
        reading = _Reading(self.images, self.pipeline, self.rows)
        together = max(1, min(READ_TOGETHER, len(places)))
        options = {}
        if workers:
            options["prefetch_factor"] = max(AHEAD, math.ceil(ahead / (workers * together)))
        loader = DataLoader(
            reading,
            batch_size=together,
            sampler=places.tolist(),
            num_workers=workers,
            collate_fn=_list,
            **options,  # type: ignore[arg-type]
        )

        batches = iter(loader)
        is_first = True
        while True:
            began = time.perf_counter()
            read = next(batches, None)
            if not is_first:
                self.waited += time.perf_counter() - began
            if read is None:
                return
            is_first = False
            yield self._batch(read)

    def image(self, place: int) -> Tensor:
        """(C, H, W) float32 in [0, 1], the image at one place; black if it cannot be read."""
        (batch,) = self.read(torch.tensor([place]))
        return batch.pixels()[0]

    def where(self, place: int) -> str:
        """How people find the image at this place."""
        return self.images.where(int(self.rows[place]))

    def _workers(self, count: int) -> int:
        if self.workers is not None:
            return self.workers
        return 0 if count < WORTH_WORKERS else min(MOST_WORKERS, _cores())

    def _batch(self, read: Sequence[_Read]) -> StreamBatch:
        """What was read, side by side and with labels as the model counts them."""
        for one in read:
            if one.error is not None:
                if not self.skip_bad:
                    raise UnreadableImage(one.error)
                self.unread[one.place] = one.error

        self._check_sizes(read)
        black = self._black(read)
        images = torch.stack([black if one.pixels is None else one.pixels for one in read])
        batch = StreamBatch(
            places=torch.tensor([one.place for one in read]),
            images=images,
            labels=torch.tensor([self._logit(one) for one in read]),
            readable=torch.tensor([one.error is None for one in read]),
        )
        return batch if self.finish is None else batch._replace(images=self.finish(batch.pixels()))

    def _check_sizes(self, read: Sequence[_Read]) -> None:
        """DataError: an image that has another size than the first one."""
        for one in read:
            if one.pixels is None:
                continue
            self._first = first = self._first or one
            assert first.pixels is not None
            if (one.pixels.shape, one.pixels.dtype) != (first.pixels.shape, first.pixels.dtype):
                raise DataError(
                    f"images must have one size, got {_kind(first.pixels)} of "
                    f"{self.where(first.place)} and {_kind(one.pixels)} of "
                    f"{self.where(one.place)}; give a resize and a crop"
                )

    def _black(self, read: Sequence[_Read]) -> Tensor:
        """What takes the place of an image that cannot be read."""
        if self._first is not None and self._first.pixels is not None:
            return torch.zeros_like(self._first.pixels)
        if self.pipeline.size is not None:
            return torch.zeros(self.pipeline.channels, *self.pipeline.size, dtype=torch.uint8)
        raise UnreadableImage(
            f"images must be readable to tell their size, got {len(read)} that are not; the "
            f"first: {read[0].error}"
        )

    def _logit(self, one: _Read) -> int:
        """The index of the model's logit for the label that was read; 0 for a black image."""
        if one.error is not None:
            return 0
        if self.logits is None:
            return one.label
        if not 0 <= one.label < len(self.logits) or self.logits[one.label] < 0:
            raise DataError(
                f"labels must be classes of the model, got {one.label} of {self.where(one.place)}"
            )
        return int(self.logits[one.label])


class _Read(NamedTuple):
    """One image as a worker hands it over: pixels (C, H, W), or why there are none."""

    place: int
    pixels: Tensor | None
    label: int
    error: str | None


class _Reading:
    """What a worker does for one place of the stream. It is all that is sent to a worker."""

    def __init__(self, images: ImageSet, pipeline: Pipeline, rows: Tensor) -> None:
        self.images = images
        self.pipeline = pipeline
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> _Read:
        row = int(self.rows[place])
        try:
            image, label = self.images.read(row, self.pipeline.channels)
        except UnreadableImage as error:
            return _Read(place, None, -1, str(error))
        return _Read(place, self._pixels(image, row), label, None)

    def _pixels(self, image: object, row: int) -> Tensor:
        """Pixels of a picture by the pipeline; an array of the right size needs nothing more."""
        if not isinstance(image, Tensor):
            return self.pipeline(image)
        size = self.pipeline.size
        if size is None or tuple(image.shape[1:]) == tuple(size):
            return image
        if image.dtype != torch.uint8:
            raise DataError(
                f"{self.images.where(row)} must have the {size[0]} × {size[1]} pixels that the "
                f"model takes, since floats are not resized, got {tuple(image.shape[1:])}"
            )

        from PIL import Image

        values = image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0)
        return self.pipeline(Image.fromarray(values.numpy()))


def _kind(pixels: Tensor) -> str:
    return f"{tuple(pixels.shape)} {str(pixels.dtype).removeprefix('torch.')}"


def _list(read: list[_Read]) -> list[_Read]:
    return read


def _cores() -> int:
    """Processor cores for this process, shared with the other processes of ``torchrun`` here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
