"""From a picture to what a model sees: how it is resized and cropped.

The rules are those of torchvision's transforms on Pillow images, which timm and RobustBench use,
too: the shorter edge gets a length and the other one keeps the ratio, rounded down; the crop lies
in the middle, half a pixel rounded to the even side; what the picture lacks is black. Image
processors of transformers differ in the half pixel, which ``centre`` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ironmoe.attacks.data.decoding import pillow
from ironmoe.attacks.data.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

Mode = Literal["shortest", "exact", "longest", "square"]
MODES: tuple[Mode, ...] = ("shortest", "exact", "longest", "square")

Centre = Literal["even", "down"]
CENTRES: tuple[Centre, ...] = ("even", "down")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a model wants its images: pixels by resize and crop, input values by mean and std.

    A perturbation lives on the pixels after the crop, in [0, 1]. Mean and std are the model's part:
    it computes (pixels − mean) / std itself.

    channels: 1 for grey, 3 for RGB.
    resize: (height, width) in pixels that ``mode`` is about, or one number for both; None: pictures
        keep their size.
    mode: "shortest": both edges become at least as long, one of them exactly so; "exact": both
        become so, whatever the ratio; "longest": both become at most as long; "square": the centre
        of the wanted ratio is cut out first, and then becomes exactly so.
    crop: (height, width) in pixels of the middle that the model sees, or one number for both; None:
        all of it.
    centre: where the middle begins if it lies between two pixels. "even": at the one with the even
        number, as in torchvision; a smaller picture lies half a pixel to the upper left. "down": at
        the first one, as in transformers; a smaller picture lies half a pixel to the lower right.
    interpolation: a name in ``INTERPOLATIONS``, always with antialiasing.
    fill: grey level or RGB, 0 to 255, of what lies outside of the picture.
    mean, std: one number for each channel, in units of the pixel range; empty: the model takes
        pixels in [0, 1] as they are.
    source: where this was read, for people.
    """

    channels: int = 3
    resize: tuple[int, int] | None = None
    mode: Mode = "shortest"
    crop: tuple[int, int] | None = None
    centre: Centre = "even"
    interpolation: str = "bilinear"
    fill: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got "
                f"{self.interpolation!r}"
            )
        if self.mode not in MODES:
            raise DataError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.centre not in CENTRES:
            raise DataError(f"centre must be one of {', '.join(CENTRES)}, got {self.centre!r}")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if isinstance(size, int):  # of a square, as torchvision takes it
                size = (size, size)
                object.__setattr__(self, name, size)
            if size is not None and not _are_pixels(size):
                raise DataError(f"{name} must be a height and a width above 0, got {size!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (0, self.channels):
                raise DataError(
                    f"{name} must have a number for each of {self.channels} channels, got {values}"
                )
        if len(self.fill) not in (0, self.channels) or any(not 0 <= v <= 255 for v in self.fill):
            raise DataError(
                f"fill must have a number from 0 to 255 for each of {self.channels} channels, got "
                f"{self.fill}"
            )
        if any(not value > 0 for value in self.std):
            raise DataError(f"std must be above 0, got {self.std}")

    def __call__(self, picture: Image.Image) -> Tensor:
        """(channels, height, width) uint8 of a picture of mode "L" or "RGB"."""
        picture = self._resized(picture)
        if self.crop is not None:
            ground = self.fill or (0,) * self.channels
            picture = _cropped(picture, self.crop, ground, self.centre)
        return as_tensor(picture)

    @property
    def changes_nothing(self) -> bool:
        """Whether pixels are those of the picture."""
        return self.resize is None and self.crop is None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of what the model sees; None if that depends on the picture."""
        if self.crop is not None:
            return self.crop
        return self.resize if self.mode in ("exact", "square") else None

    def __str__(self) -> str:
        """One line for people, such as "shorter edge to 256 (bilinear), centre 224 × 224"."""
        steps = []
        if self.resize is not None:
            steps.append(f"{_WORDS[self.mode](*self.resize)} ({self.interpolation})")
        if self.crop is not None:
            steps.append(f"centre {self.crop[0]} × {self.crop[1]}")
        steps = steps or ["as they are"]
        if self.mean or self.std:
            steps.append(f"mean {_numbers(self.mean)}, std {_numbers(self.std)}")
        return ", ".join(steps)

    def as_dict(self) -> dict[str, Any]:
        """For report.json, and for what makes two runs the same run."""
        return {
            "channels": self.channels,
            "resize": None if self.resize is None else list(self.resize),
            "mode": self.mode,
            "crop": None if self.crop is None else list(self.crop),
            "centre": self.centre,
            "interpolation": self.interpolation,
            "fill": list(self.fill),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def with_(self, **changes: Any) -> Preprocessing:
        """The same but for some fields."""
        return replace(self, **changes)

    def _resized(self, picture: Image.Image) -> Image.Image:
        if self.resize is None:
            return picture
        resample = getattr(pillow().Resampling, self.interpolation.upper())
        if self.mode == "square":
            from PIL import ImageOps

            return ImageOps.fit(picture, self.resize[::-1], resample)

        size = self._size_of(picture.height, picture.width)
        if size == (picture.height, picture.width):
            return picture
        return picture.resize(size[::-1], resample)

    def _size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size gets."""
        assert self.resize is not None
        if self.mode == "exact":
            return self.resize
        if self.mode == "shortest" and self.resize[0] == self.resize[1]:
            short = self.resize[0]
            long = int(short * max(height, width) / min(height, width))
            return (short, long) if height <= width else (long, short)

        ratios = height / self.resize[0], width / self.resize[1]
        ratio = max(ratios) if self.mode == "longest" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def _are_pixels(size: Any) -> bool:
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    return is_pair and all(isinstance(edge, int) and edge >= 1 for edge in size)


def as_tensor(picture: Image.Image) -> Tensor:
    """(channels, height, width) uint8."""
    values = np.array(picture, dtype=np.uint8)  # a copy, which torch may write to
    return torch.from_numpy(values[None] if values.ndim == 2 else values.transpose(2, 0, 1).copy())


def _cropped(
    picture: Image.Image, size: tuple[int, int], fill: tuple[int, ...], centre: Centre
) -> Image.Image:
    """The middle, on a ground of ``fill`` where the picture is smaller."""
    height, width = size
    short_h, short_w = max(height - picture.height, 0), max(width - picture.width, 0)
    if short_h or short_w:
        whole = (picture.width + short_w, picture.height + short_h)
        colour = fill[0] if picture.mode == "L" else tuple(fill)
        page = pillow().new(picture.mode, whole, colour)
        more = 1 if centre == "down" else 0
        page.paste(picture, ((short_w + more) // 2, (short_h + more) // 2))
        picture = page

    half = round if centre == "even" else math.floor
    top = half((picture.height - height) / 2)
    left = half((picture.width - width) / 2)
    return picture.crop((left, top, left + width, top + height))


_WORDS = {
    "shortest": lambda h, w: (
        f"shorter edge to {h}" if h == w else f"edges to at least {h} × {w}, ratio kept"
    ),
    "exact": lambda h, w: f"stretched to {h} × {w}",
    "longest": lambda h, w: f"into {h} × {w}, ratio kept",
    "square": lambda h, w: (
        f"centre square to {h} × {w}" if h == w else f"centre of ratio {h} : {w} to {h} × {w}"
    ),
}


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
