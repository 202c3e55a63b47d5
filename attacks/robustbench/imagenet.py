"""Which 5,000 images of ImageNet RobustBench evaluates on, and how it prepares them.

The list is RobustBench's (MIT License, Copyright (c) 2020 Francesco Croce, Maksym Andriushchenko,
Vikash Sehwag); its head says so, too.
"""

import functools
import lzma
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.data.files import ImageFiles
from ironmoe.attacks.data.preprocessing import Preprocessing

FILE = "imagenet_images.txt.xz"
COUNT = 5000


PREPARATIONS: dict[str, Preprocessing] = {
    "Res256Crop224": Preprocessing(resize=(256, 256), crop=(224, 224)),
    "Crop288": Preprocessing(crop=(288, 288)),
    "Res224": Preprocessing(resize=(224, 224), mode="exact"),
    "BicubicRes256Crop224": Preprocessing(
        resize=(256, 256), crop=(224, 224), interpolation="bicubic"
    ),
}
"""What RobustBench calls them, from pictures to pixels in [0, 1]."""


class Prepared:
    """A user's own function from a Pillow image to a tensor (3, H, W), floats in [0, 1] or uint8,
    such as a transform of torchvision, as a pipeline. TypeError where it returns something else."""

    channels = 3
    size = None

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, picture: Any) -> Tensor:
        pixels = self.transform(picture)
        is_picture = isinstance(pixels, Tensor) and pixels.ndim == 3 and len(pixels) == 3
        if not is_picture or not (pixels.is_floating_point() or pixels.dtype == torch.uint8):
            got = type(pixels).__name__
            shape = tuple(getattr(pixels, "shape", ()))
            dtype = str(getattr(pixels, "dtype", "")).removeprefix("torch.")
            raise TypeError(
                "preprocessing must return a tensor (3, H, W) of floats in [0, 1] or of uint8, got "
                f"{got}" + (f" {shape} of {dtype}" if shape else "")
            )
        return pixels

    def __str__(self) -> str:
        return repr(self.transform)

    def as_dict(self) -> dict[str, Any]:
        return {"transform": repr(self.transform)}


def imagenet_images(folder: Path | str, n_examples: int = COUNT) -> ImageFiles:
    """The first images of RobustBench's list, in its order, with WordNet ids as names of classes.

    A label is the place of its id among all 1,000 in alphabetical order, which is the standard
    order of ImageNet's classes.

    Files are read as RobustBench reads them, by ``Image.open(file).convert("RGB")``. That does not
    turn an image as its EXIF orientation says, and here it must not either, so that the numbers are
    RobustBench's.

    Args:
        folder: with ``val/SYNSET/FILE``, ``SYNSET/FILE``, or the files alone, as the archive of
            ILSVRC 2012 has them.

    Raises:
        ValueError: more images than there are.
        FileNotFoundError: some are not there; the message names the first.
    """
    if not 1 <= n_examples <= COUNT:
        raise ValueError(f"n_examples must be from 1 to {COUNT} for imagenet, got {n_examples}")
    classes, chosen = _listed()
    number = {synset: place for place, synset in enumerate(classes)}
    listed = [(synset, f"ILSVRC2012_val_{image:08d}.JPEG") for synset, image in chosen[:n_examples]]

    layouts = ("val/{synset}/{file}", "{synset}/{file}", "{file}")
    there: list[str] = []
    for layout in layouts:
        there = [layout.format(synset=synset, file=file) for synset, file in listed]
        if (Path(folder) / there[0]).is_file():
            break
    missing = [file for file in there if not os.path.lexists(Path(folder) / file)]
    if missing:
        raise FileNotFoundError(
            "the folder must hold the validation images of ILSVRC 2012, as val/SYNSET/FILE, "
            f"SYNSET/FILE or FILE, got {str(folder)!r} without {len(missing)} of {len(listed)}, "
            f"first {missing[0]}: they come from https://image-net.org, after a registration"
        )
    labels = [number[synset] for synset, _ in listed]
    name = f"RobustBench's {len(listed)} images of ImageNet"
    return ImageFiles(name, Path(folder), there, labels, classes, as_stored=True)


@functools.cache
def _listed() -> tuple[list[str], list[tuple[str, int]]]:
    """(all synsets in order, the chosen images as synset and number)."""
    packed = resources.files(__package__).joinpath(FILE).read_bytes()
    lines = [line.split() for line in lzma.decompress(packed).decode().splitlines()]
    rows = [line for line in lines if line[0] != "#"]
    classes = [row[0] for row in rows if len(row) == 1]
    return classes, [(row[0], int(row[1])) for row in rows if len(row) == 2]
