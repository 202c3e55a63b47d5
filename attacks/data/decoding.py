"""Image files in, upright 8-bit pictures out.

Whatever a file holds becomes grey or RGB with 8 bits: EXIF orientation is applied, transparency
lies on white, 16 bits are rounded to 8, palettes and CMYK are converted. Of a file with several
pictures the first counts. What has no such meaning is refused by name.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ironmoe.attacks.data.errors import DataError, UnreadableImage

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
)
"""How names of files end that are read as images, in small letters."""

SIXTEEN_BITS = 65535
ORIENTATION, UPRIGHT = 0x0112, 1  # of EXIF
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})


def read_image(source: Path | bytes, channels: int, name: str = "") -> Image.Image:
    """The picture in a file.

    Args:
        source: the file, or what it holds.
        channels: 1 for mode "L", 3 for mode "RGB".
        name: how errors call it; by default its path.

    Raises:
        UnreadableImage: there is no such file, it is damaged, or its pixels have no known range.
    """
    image_module = pillow()
    called = name or (str(source) if isinstance(source, Path) else "given as bytes")

    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            file.load()
            return as_picture(file, channels)
    except image_module.DecompressionBombError as error:
        raise UnreadableImage(f"image {called} cannot be read: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableImage(f"image {called} cannot be read: {error}") from error


def as_picture(image: Image.Image, channels: int) -> Image.Image:
    """A Pillow image of any mode as mode "L" (channels 1) or "RGB" (channels 3), upright.

    Raises:
        DataError: the mode's values have no known range, as 32-bit numbers.
    """
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3 to read pictures, got {channels}")
    if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)

    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = _on_white(image)

    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def is_grey(image: Image.Image) -> bool:
    """Whether a file that was opened, but not yet read, has a grey picture."""
    return image.mode in GREY_MODES


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        DataError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"image files are read by Pillow: pip install pillow ({error})") from error
    return Image


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, rounded to 8. Pillow gives it as mode I;16, or in some formats as I."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise DataError(
            f"pixels must have 8 or 16 bits, got mode {image.mode!r} with values from "
            f"{values.min():g} to {values.max():g}, whose range nobody knows"
        )

    eight_bits = (values.astype(np.uint32) * 255 + SIXTEEN_BITS // 2) // SIXTEEN_BITS
    eight_bits[values == image.info.get("transparency", -1)] = 255  # this level is transparent
    return pillow().fromarray(eight_bits.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """What is seen of an image with transparency on a white page."""
    layers = image.convert("RGBA")
    page = pillow().new("RGBA", layers.size, "white")
    page.alpha_composite(layers)
    return page.convert("RGB")
