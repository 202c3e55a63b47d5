"""JPEG files of awkward shapes, as photographs come."""

from pathlib import Path

import numpy as np
from PIL import Image

# height, width, mode: landscape, portrait, odd, smaller than a crop in one edge and in both, grey
SHAPES = (
    (97, 161, "RGB"),
    (161, 97, "RGB"),
    (61, 60, "RGB"),
    (20, 90, "RGB"),
    (15, 11, "RGB"),
    (75, 50, "L"),
)


def write_jpegs(folder: Path) -> list[Path]:
    """Files with edges, slopes and noise, so that every wrong pixel of a resize or crop shows."""
    random = np.random.default_rng(0)
    files = []
    for i, (height, width, mode) in enumerate(SHAPES):
        rows, columns = np.mgrid[:height, :width]
        slope = 255 * (rows / height + columns / width) / 2
        pattern = np.where((rows // 5 + columns // 7) % 2, slope, 255 - slope)
        channels = np.stack([pattern, pattern[::-1], pattern[:, ::-1]], axis=-1)
        noisy = (channels + random.normal(0, 20, channels.shape)).clip(0, 255).astype(np.uint8)
        file = folder / f"{i}.jpg"
        Image.fromarray(noisy[:, :, 0] if mode == "L" else noisy).save(file, quality=90)
        files.append(file)
    return files
