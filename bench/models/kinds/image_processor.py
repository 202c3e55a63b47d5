"""What an image processor of transformers does to a picture, found by what comes out of it.

A processor resizes and crops in 8-bit pixels, and then computes an affine function of them, channel
by channel. The first part stays with the data, where perturbations have their unit; the second
belongs to the model. Neither is taken from the processor's settings on trust: whatever the family
calls them, the pixels are compared with the processor's own on pictures of several shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ironmoe.attacks.data.decoding import pillow
from ironmoe.attacks.data.preprocessing import INTERPOLATIONS, Preprocessing
from ironmoe.attacks.data.reading import Pipeline
from ironmoe.moe.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    from PIL import Image

# what turns off everything that a processor does to values, in those that know the word
PIXELS_ONLY = {
    "do_rescale": False,
    "do_normalize": False,
    "do_flip_channel_order": False,
    "rescale_offset": False,
    "include_top": False,
}
# height and width of pictures to compare with: their crops begin at all sorts of half pixels, and
# some are narrower than a crop in one direction alone
SHAPES = (
    (97, 161), (233, 131), (301, 300), (30, 47), (64, 113), (115, 64), (64, 117), (9, 11),
    (301, 20), (300, 21), (20, 301), (21, 300), (64, 6), (7, 65),
)  # fmt: skip
WITHIN = 1e-5  # of the largest value: float32 and seven digits of mean and std round by less
DIGITS = 7  # of mean and std, which a float32 has
WITHOUT = "processor=false leaves it out"


class Taken(NamedTuple):
    """A processor in two parts: pixels = pipeline(picture), and (pixels − mean) / std, of which
    ``order`` says the channels that the model gets, None if all in their order."""

    pipeline: Pipeline
    mean: list[float]
    std: list[float]
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class ProcessorPixels:
    """The resize and the crop of an image processor, run by the processor itself.

    size: (height, width) of the pixels, None if that depends on the picture; channels: 1 or 3;
    source: for people.
    """

    processor: Any
    size: tuple[int, int] | None
    channels: int
    source: str

    def __call__(self, picture: Image.Image) -> Tensor:
        """(channels, height, width) uint8 of a picture of mode "L" or "RGB"."""
        return _run(self.processor, picture, pixels_only=True).to(torch.uint8)

    def __str__(self) -> str:
        size = "the picture's size" if self.size is None else f"{self.size[0]} × {self.size[1]}"
        return f"{type(self.processor).__name__} itself, to {size}"

    def as_dict(self) -> dict[str, Any]:
        """For report.json, and for what makes two runs the same run."""
        return {"processor": self.processor.to_dict()}


def take(processor: Any, channels: int, name: str) -> Taken:
    """The two parts of a processor.

    Args:
        channels: of the model: 1 for grey, 3 for RGB.
        name: how errors begin.

    Raises:
        CheckpointError: it gives no picture for a picture, pixels that are not 8-bit, or values
            that are no affine function of the pixels.
    """
    whose = f"{name}: its {type(processor).__name__}"
    pictures = list(_pictures(channels))
    try:
        pixels = [_run(processor, picture, pixels_only=True) for picture in pictures]
        values = [_run(processor, picture, pixels_only=False) for picture in pictures]
    except Exception as error:
        raise CheckpointError(
            f"{whose} must give pixel_values (1, {channels}, H, W) for a picture, got "
            f"{type(error).__name__}: {error}; {WITHOUT}"
        ) from error

    if any(not torch.equal(each, each.clamp(0, 255).round()) for each in pixels):
        raise CheckpointError(
            f"{whose} must resize and crop to whole pixels from 0 to 255, got other values; "
            f"{WITHOUT}"
        )
    found = [_affine(some, pixels[0], channel) for channel, some in enumerate(values[0])]
    order = [channel for channel, _, _ in found]
    of_pixels = sorted(found)  # mean and std of the pixels' first channel come first
    mean, std = [each for _, each, _ in of_pixels], [each for _, _, each in of_pixels]
    is_affine = sorted(order) == list(range(channels)) and all(
        _is_near(_normalized(some, mean, std)[order], wanted)
        for some, wanted in zip(pixels, values, strict=True)
    )
    if not is_affine:
        raise CheckpointError(
            f"{whose} must compute (pixels − mean) / std of each channel of its pixels, got other "
            f"values; {WITHOUT}"
        )

    pipeline = _pipeline(processor, channels, pictures, pixels)
    if isinstance(pipeline, Preprocessing):
        pipeline = pipeline.with_(mean=tuple(mean), std=tuple(std))
    return Taken(pipeline, mean, std, None if order == list(range(channels)) else tuple(order))


def _run(processor: Any, picture: Image.Image, *, pixels_only: bool) -> Tensor:
    """(C, H, W) of one picture."""
    known = {name: off for name, off in PIXELS_ONLY.items() if hasattr(processor, name)}
    given = processor(picture, return_tensors="pt", **(known if pixels_only else {}))
    values = torch.as_tensor(given["pixel_values"])
    if values.ndim != 4 or len(values) != 1 or set(given) - {"pixel_values", "pixel_mask"}:
        raise ValueError(f"{', '.join(given)} of shape {tuple(values.shape)}")
    return values[0]


def _pictures(channels: int) -> Iterator[Image.Image]:
    """Noise of several shapes."""
    random = np.random.default_rng(0)
    for height, width in SHAPES:
        values = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        yield pillow().fromarray(values[:, :, 0] if channels == 1 else values)


def _affine(values: Tensor, pixels: Tensor, channel: int) -> tuple[int, float, float]:
    """(which channel of the pixels (C, H, W) the values (H, W) are an affine function of, its mean,
    its std), by least squares in float64."""
    y = values.double().flatten()
    best: tuple[float, int, float, float] | None = None
    for other in [channel, *(i for i in range(len(pixels)) if i != channel)]:
        x = pixels[other].double().flatten() / 255
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        offset = y.mean() - slope * x.mean()
        missed = float((slope * x + offset - y).abs().max())
        if best is None or missed < best[0]:
            best = (missed, other, float(-offset / slope), float(1 / slope))
    assert best is not None
    _, other, mean, std = best
    return other, round(mean, DIGITS) + 0.0, float(f"{std:.{DIGITS}g}")


def _normalized(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    shift, scale = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))
    return (pixels.float() / 255 - shift) / scale


def _is_near(values: Tensor, wanted: Tensor) -> bool:
    return bool((values - wanted).abs().max() <= WITHIN * max(1, float(wanted.abs().max())))


def _pipeline(
    processor: Any,
    channels: int,
    pictures: list[Image.Image],
    pixels: list[Tensor],
) -> Pipeline:
    """The rules of ``Preprocessing`` if some give the same pixels, else the processor itself."""
    source = type(processor).__name__.removesuffix("Pil")
    for rules in _candidates(processor, channels):
        same = all(
            torch.equal(rules(picture), want.to(torch.uint8))
            for picture, want in zip(pictures, pixels, strict=True)
        )
        if same:
            return rules.with_(source=source)

    sizes = {tuple(each.shape[1:]) for each in pixels}
    (height, width) = min(sizes)
    return ProcessorPixels(
        processor, (height, width) if len(sizes) == 1 else None, channels, source
    )


def _candidates(processor: Any, channels: int) -> Iterator[Preprocessing]:
    """What the settings of a processor may mean, in one family or another."""
    size, crop = (_edges(getattr(processor, name, None)) for name in ("size", "crop_size"))
    base = Preprocessing(channels=channels, centre="down")
    interpolation = _interpolation(getattr(processor, "resample", None))
    if interpolation is not None:
        base = base.with_(interpolation=interpolation)

    plain = base.with_(crop=crop if getattr(processor, "do_center_crop", False) else None)
    if not getattr(processor, "do_resize", False):
        yield plain
    if size is None:
        return
    yield plain.with_(resize=size, mode="exact")
    yield plain.with_(resize=size, mode="shortest")

    percent = getattr(processor, "crop_pct", None)
    larger = [int(256 / 224 * size[0])]  # LeViT
    if percent:
        larger.append(int(size[0] / percent))  # ConvNeXt, PoolFormer
    for edge in larger:
        of_edge = base.with_(resize=(edge, edge), mode="shortest")
        yield of_edge.with_(crop=size)
        yield of_edge.with_(crop=plain.crop)


def _edges(size: Any) -> tuple[int, int] | None:
    """(height, width) in a processor's ``size`` or ``crop_size``."""
    if isinstance(size, int):
        return size, size
    get = size.get if hasattr(size, "get") else lambda name: getattr(size, name, None)
    height, width = get("height"), get("width")
    edge = get("shortest_edge")
    return (height, width) if height and width else (edge, edge) if edge else None


def _interpolation(resample: Any) -> str | None:
    """The name of a resampling that is given by Pillow's number, or by a name; None for any
    other."""
    names = {str(int(pillow().Resampling[name.upper()])): name for name in INTERPOLATIONS}
    names |= {name: name for name in INTERPOLATIONS}
    return names.get(str(getattr(resample, "value", resample)).lower())
