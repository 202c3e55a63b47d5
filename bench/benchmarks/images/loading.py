"""Images off the disk: ``ImageStream`` beside a plain loader of the usual kind."""

import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ironmoe.attacks.data import ImageStream, Preprocessing
from ironmoe.attacks.data.files import ImageFiles
from ironmoe.bench.benchmarks.images.memory import Row

RESIZE, CROP, BATCH = 256, 224, 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOADERS = ("plain", "stream")
WARM = 256  # images that are not timed, while the workers start


class PlainImages(Dataset[tuple[Tensor, int]]):
    """What most scripts have: each image is opened, resized, cropped and normalised by a worker,
    and comes as float32."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.mean = torch.tensor(MEAN).view(3, 1, 1)
        self.std = torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.files[number]) as file:
            picture = file.convert("RGB")
        width, height = picture.size
        short, long = RESIZE, int(RESIZE * max(width, height) / min(width, height))
        size = (short, long) if width <= height else (long, short)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = round((size[0] - CROP) / 2), round((size[1] - CROP) / 2)
        picture = picture.crop((left, top, left + CROP, top + CROP))

        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
        return (pixels - self.mean) / self.std, 0


def loaded(loader: str, files: list[str], workers: int) -> Row:
    """Read all images once, as float32 on CPU: normalised by the plain loader, and in [0, 1] from a
    stream, whose model normalises itself.

    Returns:
        images_per_second after the first WARM, or the first half, which are taken while the workers
        start; checksum: of the first images, normalised.
    """
    warm = min(WARM, len(files) // 2) if len(files) > BATCH else 0  # one batch is timed whole
    began, timed_from = time.perf_counter(), 0
    seen, checksum = 0, 0
    for images in _batches(loader, files, workers):
        if not seen:
            few = images[:32] if loader == "plain" else _normalised(images[:32])
            checksum = zlib.crc32(few.numpy().tobytes())
        seen += len(images)
        if warm and not timed_from and seen >= warm:
            began, timed_from = time.perf_counter(), seen
    seconds = time.perf_counter() - began
    return {
        "loader": loader,
        "images": len(files),
        "workers": workers,
        "images_per_second": (seen - timed_from) / seconds,
        "checksum": checksum,
    }


def _batches(loader: str, files: list[str], workers: int):  # type: ignore[no-untyped-def]
    if loader == "plain":
        for images, _ in DataLoader(PlainImages(files), batch_size=BATCH, num_workers=workers):
            yield images
        return

    folder = Path(files[0]).parent
    names = [Path(file).name for file in files]
    images = ImageFiles("jpegs", folder, names, [0] * len(names), None)
    pipeline = Preprocessing(resize=(RESIZE, RESIZE), crop=(CROP, CROP))
    for pixels, _ in ImageStream(images, pipeline, workers=workers):
        yield pixels


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
