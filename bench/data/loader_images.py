"""The batches of a user's loader as the images of an evaluation."""

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ironmoe.attacks.data import DataError, LoaderStream, Preprocessing, StreamBatch
from ironmoe.attacks.evaluation.checksum import checksum


class LoaderImages:
    """The first images of a loader, in its order; a loop over them gives (images, labels).

    Args:
        loader: the user's.
        most: how many images to take, at most.
        finish: what becomes of a batch of pixels.

    Attributes:
        logits: (L,) int64, for each label the index of its logit; None: labels are indices already.
        num_logits: how many the model has; None: labels are not checked.
        pipeline: images are taken as they are.
        waited: the seconds that takers waited for images, after the first batch.
        unread: none; a loader says itself what it cannot read.
    """

    def __init__(
        self,
        loader: LoaderStream,
        most: int,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.loader = loader
        self.most = most
        self.logits: Tensor | None = None
        self.num_logits: int | None = None
        self.finish = finish
        self.pipeline = Preprocessing()
        self.unread: dict[int, str] = {}
        self.waited = 0.0
        self._count = most
        self._checksums: list[int] = []  # of the batches that came
        if loader.length is not None:
            self._count = min(most, loader.length)

    def __len__(self) -> int:
        """How many images there are; where the loader does not know, ``most`` until it ended."""
        return self._count

    @property
    def rows(self) -> Tensor:
        """(M,) int64: an image's place in the loader."""
        return torch.arange(len(self))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.most
        batches = iter(self.loader)
        for number in itertools.count():
            if not left:
                return
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += (time.perf_counter() - began) * (left < self.most)
            if batch is None:
                self._count = self.most - left
                return
            images, labels = batch[0][:left], batch[1][:left]
            self._check_same(number, images, labels)
            labels = self._checked(labels, self.most - left)
            left -= len(labels)
            yield (images if self.finish is None else self.finish(images)), labels

    def read(self, places: Tensor, ahead: int = 0) -> Iterator[StreamBatch]:
        """The images at these places (n,) in this order, as one batch: the loader is gone through
        again."""
        wanted = set(places.tolist())
        found: dict[int, tuple[Tensor, Tensor]] = {}
        number = 0
        for images, labels in self:
            for image, label in zip(images, labels, strict=True):
                if number in wanted:
                    found[number] = (image, label)
                number += 1
            if len(found) == len(wanted):
                break
        missing = [place for place in places.tolist() if place not in found]
        if missing:
            raise DataError(
                f"{self.loader.name} must give its images again, got {number} of them, without "
                f"number {missing[0]}"
            )
        some = [found[place] for place in places.tolist()]
        yield StreamBatch(
            places=places,
            images=torch.stack([image for image, _ in some]),
            labels=torch.stack([label for _, label in some]),
            readable=torch.ones(len(some), dtype=torch.bool),
        )

    def _check_same(self, number: int, images: Tensor, labels: Tensor) -> None:
        """DataError: a batch is another one than when the loader was gone through before."""
        found = checksum(images, checksum(labels))
        if number == len(self._checksums):
            self._checksums.append(found)
        if self._checksums[number] != found:
            raise DataError(
                f"{self.loader.name} must give the same images in the same order each time, got "
                f"two different batches {number}: leave out what shuffles or changes them"
            )

    def _checked(self, labels: Tensor, first: int) -> Tensor:
        """The logits of these labels."""
        count = self.num_logits if self.logits is None else len(self.logits)
        if count is None or not len(labels):
            return labels
        low, high = int(labels.min()), int(labels.max())
        inside = low >= 0 and high < count
        found = self.logits[labels] if inside and self.logits is not None else labels
        if not inside or int(found.min()) < 0:
            of_what = "logits" if self.logits is None else "classes that have a logit"
            raise DataError(
                f"labels of the loader must be indices of the {count} {of_what}, 0 … {count - 1}, "
                f"got {low} … {high} among images {first} … {first + len(labels) - 1}"
            )
        return found
