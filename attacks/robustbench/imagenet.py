"""Which 5,000 images of ImageNet RobustBench evaluates on, and how it prepares them.

The list is RobustBench's (MIT License, Copyright (c) 2020 Francesco Croce, Maksym Andriushchenko,
Vikash Sehwag); its head says so, too.
"""

import functools
import lzma
from importlib import resources
from pathlib import Path
from typing import NamedTuple

FILE = "imagenet_images.txt.xz"
COUNT = 5000


class Preparation(NamedTuple):
    """How an image becomes a tensor in [0, 1].

    resize: an int: the shorter side gets so long; (height, width): both do; None: it stays
    crop: the side of the square that is cut from the middle; None: all of it
    interpolation: of ``resize``
    """

    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    interpolation: str = "bilinear"


PREPARATIONS: dict[str | None, Preparation] = {
    None: Preparation(),
    "Res256Crop224": Preparation(256, 224),
    "Crop288": Preparation(None, 288),
    "Res224": Preparation((224, 224)),
    "BicubicRes256Crop224": Preparation(256, 224, "bicubic"),
}
"""RobustBench's names for them."""


def imagenet_images(data_dir: Path | str, n_examples: int = COUNT) -> tuple[list[Path], list[int]]:
    """(paths, labels) of the images in RobustBench's order, ``data_dir/val/SYNSET/FILE``.

    A label is the place of the synset among all 1,000 in alphabetical order, as RobustBench has it
    where the folder holds every class.

    Raises:
        ValueError: more images than there are.
        FileNotFoundError: some are not there; the message names the first.
    """
    if not 1 <= n_examples <= COUNT:
        raise ValueError(f"n_examples must be from 1 to {COUNT} for imagenet, got {n_examples}")
    classes, chosen = _listed()
    number = {synset: place for place, synset in enumerate(classes)}
    names = [(synset, f"ILSVRC2012_val_{image:08d}.JPEG") for synset, image in chosen[:n_examples]]
    paths = [Path(data_dir) / "val" / synset / name for synset, name in names]

    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            "data_dir must hold the validation images of ILSVRC 2012 as val/SYNSET/FILE, got "
            f"{str(data_dir)!r} without {len(missing)} of {len(paths)}, first {missing[0]}: they "
            "come from https://image-net.org, after a registration"
        )
    return paths, [number[synset] for synset, _ in names]


@functools.cache
def _listed() -> tuple[list[str], list[tuple[str, int]]]:
    """(all synsets in order, the chosen images as synset and number)."""
    packed = resources.files(__package__).joinpath(FILE).read_bytes()
    lines = [line.split() for line in lzma.decompress(packed).decode().splitlines()]
    rows = [line for line in lines if line[0] != "#"]
    classes = [row[0] for row in rows if len(row) == 1]
    return classes, [(row[0], int(row[1])) for row in rows if len(row) == 2]
