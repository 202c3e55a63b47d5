"""JPEG files that look a little like photographs to a decoder: smooth areas, edges and grain."""

from pathlib import Path

import numpy as np
from rich.console import Console

from ironmoe.bench.common.progress_bars import progress_bars

SHORTEST, LONGEST = 224, 512  # pixels of an edge
CELL = 32  # pixels of the smooth structure
GRAIN = 6.0  # standard deviation of the noise, of 255
QUALITY = 90


def make_jpegs(folder: Path, count: int, console: Console) -> list[Path]:
    """The first ``count`` images, 000000.jpg and on; those that are there already stay.

    An image depends on its number alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:06}.jpg" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    if missing:
        with progress_bars(console) as bars:
            task = bars.add_task("JPEGs", total=len(missing), note="made")
            for number in missing:
                _write(files[number], number)
                bars.advance(task)
    return files


def _write(file: Path, number: int) -> None:
    from PIL import Image

    generator = np.random.default_rng(number)
    height, width = generator.integers(SHORTEST, LONGEST, 2, endpoint=True)
    coarse = generator.integers(0, 256, (height // CELL + 2, width // CELL + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
    grain = generator.normal(0, GRAIN, (height, width, 1))
    pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
    partial = file.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, "JPEG", quality=QUALITY)
    partial.replace(file)
