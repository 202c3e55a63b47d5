"""Pictures resized as TensorFlow does it, which the official V-MoE code uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TensorFlowResize:
    """``tf.cast(tf.image.resize(image, size), tf.uint8)``: bilinear without antialiasing, and
    values cut off to whole numbers.

    Each value is a mean of four neighbours, however much smaller the picture becomes, where Pillow
    takes the mean over everything that a new pixel covers.

    size: (height, width) in pixels, whatever the ratio; channels: 1 for grey, 3 for RGB; source:
    where this was read, for people.
    """

    size: tuple[int, int]
    channels: int = 3
    source: str = ""

    def __call__(self, picture: Image.Image) -> Tensor:
        """(channels, height, width) uint8 of a picture of mode "L" or "RGB"."""
        values = np.asarray(picture, dtype=np.float32)
        values = values[:, :, None] if values.ndim == 2 else values
        above, below, down = _neighbours(values.shape[0], self.size[0])
        left, right, across = _neighbours(values.shape[1], self.size[1])

        # in TensorFlow's order, and in float32: what is cut off depends on the last bit
        across, down = across[None, :, None], down[:, None, None]
        upper = values[above][:, left] + (values[above][:, right] - values[above][:, left]) * across
        lower = values[below][:, left] + (values[below][:, right] - values[below][:, left]) * across
        resized = (upper + (lower - upper) * down).astype(np.uint8)
        return torch.from_numpy(resized.transpose(2, 0, 1).copy())

    def __str__(self) -> str:
        height, width = self.size
        return f"stretched to {height} × {width} (TensorFlow's bilinear, no antialiasing)"

    def as_dict(self) -> dict[str, Any]:
        """For report.json, and for what makes two runs the same run."""
        return {"resize": list(self.size), "mode": "exact", "interpolation": "bilinear, TensorFlow"}


def _neighbours(length: int, wanted: int) -> tuple[Array, Array, Array]:
    """For each place of a line of ``wanted`` pixels: the two pixels of a line of ``length`` that it
    lies between, and how far it is from the first one to the second."""
    ratio = np.float32(length) / np.float32(wanted)
    at = (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) * ratio - np.float32(0.5)
    floor = np.floor(at)
    first = np.maximum(floor, 0).astype(np.int64)
    second = np.minimum(np.ceil(at), length - 1).astype(np.int64)
    return first, second, at - floor
