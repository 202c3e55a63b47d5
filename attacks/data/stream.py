"""A stream of images: decoded by worker processes, a few batches ahead of whoever takes them.

Images stay 8-bit numbers until they are on the device, and no more of them are in memory than the
workers are ahead. What comes out depends on neither the number of workers nor the batches.
"""

from __future__ import annotations

import math
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import ImageSet
from ironmoe.attacks.data.reading import Kind, Pipeline, Read, Reading, ReadTogether, side_by_side

READ_TOGETHER = 32  # images that a worker hands over at once
MOST_WORKERS = 8
WORTH_A_MAP = 1_000_000  # bytes
AHEAD = 2  # batches that each worker is ahead, at least
WORTH_WORKERS = 256  # images; fewer are read before a worker has started


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
        if images.dtype != torch.uint8:
            return images
        if images.device.type != "cpu":
            return images.float().div_(255)
        return _room(images.shape).copy_(images).div_(255)  # without a copy in between


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
        if not hasattr(images, "read") or not hasattr(images, "where"):
            raise DataError(
                f"images must be a set, such as image_folder(…) gives, got {type(images).__name__}"
            )
        if not callable(pipeline) or not hasattr(pipeline, "channels"):
            raise DataError(
                f"pipeline must make pixels of pictures, as Preprocessing does, got {pipeline!r}"
            )
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
        self._first: Kind | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.read(torch.arange(len(self))):
            good = batch.readable
            if not bool(good.all()):
                batch = StreamBatch(*(column[good] for column in batch))
            if len(batch.labels):
                yield batch.pixels(), batch.labels

    def read(self, places: Tensor, *, ahead: int = 0, at_least: int = 1) -> Iterator[StreamBatch]:
        """The images at these places (n,), in this order, in batches.

        ahead: how many images the workers are to be ahead, if they can.
        at_least: how many images a batch has, but for the last one.
        """
        waiting: list[StreamBatch] = []
        for batch in self._batches(places, ahead):
            waiting.append(batch)
            if sum(len(each.places) for each in waiting) >= at_least:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)

    def part(self, places: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> ImageStream:
        """The stream of the images at these places (n,).

        finish: what becomes of a batch of pixels after what the stream itself does to it.
        """
        own = self.finish

        def both(pixels: Tensor) -> Tensor:
            pixels = pixels if own is None else own(pixels)
            return pixels if finish is None else finish(pixels)

        return ImageStream(
            self.images,
            self.pipeline,
            rows=self.rows[places],
            logits=self.logits,
            workers=self.workers,
            skip_bad=self.skip_bad,
            finish=own if finish is None else both,
        )

    def where(self, place: int) -> str:
        """How people find the image at this place."""
        return self.images.where(int(self.rows[place]))

    def _batches(self, places: Tensor, ahead: int) -> Iterator[StreamBatch]:
        """The batches as the workers hand them over."""
        workers = self._workers(len(places))
        together = max(1, min(READ_TOGETHER, len(places)))
        options = {}
        if workers:
            options["prefetch_factor"] = max(AHEAD, math.ceil(ahead / (workers * together)))
        with warnings.catch_warnings():
            # That there are more workers than cores is the user's choice.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader: DataLoader[Read] = DataLoader(
                Reading(self.images, self.pipeline, self.rows),
                batch_size=together,
                sampler=places.tolist(),
                num_workers=workers,
                collate_fn=side_by_side,
                generator=torch.Generator(),  # else it takes a number from everybody's generator
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
            if read.refused is not None:
                raise DataError(read.refused)
            yield self._batch(read)

    def _workers(self, count: int) -> int:
        if self.workers is not None:
            return self.workers
        return 0 if count < WORTH_WORKERS else min(MOST_WORKERS, _cores())

    def _batch(self, read: ReadTogether) -> StreamBatch:
        """What was read, with labels as the model counts them."""
        for place, error in zip(read.places, read.errors, strict=True):
            if error is not None:
                if not self.skip_bad:
                    raise UnreadableImage(error)
                self.unread[place] = error

        readable = torch.tensor([error is None for error in read.errors])
        batch = StreamBatch(
            places=torch.tensor(read.places),
            images=self._images(read, readable),
            labels=torch.tensor([self._logit(read, one) for one in range(len(read.places))]),
            readable=readable,
        )
        return batch if self.finish is None else batch._replace(images=self.finish(batch.pixels()))

    def _images(self, read: ReadTogether, readable: Tensor) -> Tensor:
        """(n, C, H, W), black where an image cannot be read.

        Raises:
            DataError: an image of another size than the first one of the stream.
        """
        for kind in read.kinds:
            self._first = first = self._first or kind
            if (kind.shape, kind.dtype) != (first.shape, first.dtype):
                raise DataError(
                    f"images must have one size, got {_words(first)} of "
                    f"{self.where(first.place)} and {_words(kind)} of "
                    f"{self.where(kind.place)}; give a resize and a crop"
                )
        if read.pixels is None:
            return self._black(read).repeat(len(readable), 1, 1, 1)
        if len(read.pixels) == len(readable):
            return read.pixels
        images = read.pixels.new_zeros(len(readable), *read.pixels.shape[1:])
        images[readable] = read.pixels
        return images

    def _black(self, read: ReadTogether) -> Tensor:
        """(C, H, W), what takes the place of images of which none can be read."""
        if self._first is not None:
            return torch.zeros(self._first.shape, dtype=self._first.dtype)
        if self.pipeline.size is not None:
            return torch.zeros(self.pipeline.channels, *self.pipeline.size, dtype=torch.uint8)
        raise UnreadableImage(
            f"images must be readable to tell their size, got {len(read.places)} that are not; the "
            f"first: {read.errors[0]}"
        )

    def _logit(self, read: ReadTogether, one: int) -> int:
        """The index of the model's logit for a label that was read. Of an image that could not be
        read, the label may be known all the same; else it is 0."""
        label = read.labels[one]
        if read.errors[one] is not None:
            if self.images.labels is None:
                return 0
            label = int(self.images.labels[self.rows[read.places[one]]])
        known = label >= 0 if self.logits is None else 0 <= label < len(self.logits)
        if not known or (self.logits is not None and self.logits[label] < 0):
            raise DataError(
                f"labels must be classes of the model, got {label} of "
                f"{self.where(read.places[one])}"
            )
        return label if self.logits is None else int(self.logits[label])


def _room(shape: torch.Size) -> Tensor:
    """Memory for float32 numbers that goes back to the system when nobody needs it any more. What
    malloc keeps of tensors of this size, one for each batch, may grow with the number of images."""
    size = math.prod(shape) * torch.float32.itemsize
    if size < WORTH_A_MAP:
        return torch.empty(shape)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32).view(shape)


def _joined(batches: list[StreamBatch]) -> StreamBatch:
    if len(batches) == 1:
        return batches[0]
    return StreamBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def _words(kind: Kind) -> str:
    return f"{tuple(kind.shape)} {str(kind.dtype).removeprefix('torch.')}"


def _cores() -> int:
    """Processor cores for this process, shared with the other processes of ``torchrun`` here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
