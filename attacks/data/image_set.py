"""What a set of images is, whatever it is stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

LARGEST_LABEL = 2**63 - 1  # of int64


class Item(NamedTuple):
    """One image of a set.

    image: a Pillow image; or (C, H, W) as a tensor, uint8 or floats in [0, 1], that needs no
        decoding.
    label: its class, as the set counts them.
    """

    image: Image.Image | Tensor
    label: int


class ImageSet(Protocol):
    """Images that are read one by one, in any order, by several processes.

    name: of the set, for reports.
    names: of its classes, where labels are numbers of these names; None: labels are indices of the
        logits.
    labels: (N,) int64; None: a label is known when its image is read.
    fingerprint: a short text that differs for another choice of files, without reading all of them.
    notes: what people should know, such as which files are no images.
    """

    @property
    def name(self) -> str: ...

    @property
    def names(self) -> list[str] | None: ...

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def notes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def read(self, number: int, channels: int) -> Item:
        """The image of this number, of 1 or 3 channels.

        Raises:
            UnreadableImage: it cannot be read, while others may be.
        """
        ...

    def where(self, number: int) -> str:
        """How people find this image: its file, or its place."""
        ...


def digest(lines: Iterable[Sequence[object]]) -> str:
    """SHA-256 of lines of values."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(("\t".join(map(str, line)) + "\n").encode("utf-8", "surrogateescape"))
    return whole.hexdigest()
