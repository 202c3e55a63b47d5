"""Images in [0, 1] as PNG files, and back to the same numbers."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LEVELS = 256


def png(image: Tensor) -> bytes:
    """A file of an image (1 or 3, H, W) whose values are multiples of 1/255.

    Raises:
        ValueError: another shape, or values between those that a PNG holds.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be (1 or 3, H, W) for a PNG, got {tuple(image.shape)}")
    steps = (image.double() * (LEVELS - 1)).round().clamp(0, LEVELS - 1).to(torch.uint8)
    if not torch.equal(in_unit_range(steps), image):
        apart = (in_unit_range(steps) - image).abs().max()
        raise ValueError(
            f"image must hold multiples of 1/{LEVELS - 1} for a PNG, got one that lies "
            f"{float(apart):.2g} beside"
        )

    file = io.BytesIO()
    array = steps.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array[:, :, 0] if image.shape[0] == 1 else array).save(file, format="PNG")
    return file.getvalue()


def from_png(data: bytes) -> Tensor:
    """The image (1 or 3, H, W) of such a file, float32."""
    with Image.open(io.BytesIO(data)) as file:
        array = np.asarray(file)
    steps = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return in_unit_range(torch.from_numpy(steps.copy()))


def in_unit_range(steps: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1], as ``--data`` reads it."""
    return steps.float().div(LEVELS - 1)
