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
CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")  # beside those with transparency
SCALED = ("PNG", "PPM")  # formats whose mode I holds 16 bits
BITS_PER_SAMPLE = 258  # a tag of TIFF
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})


def read_image(
    source: Path | bytes, channels: int, name: str = "", *, as_stored: bool = False
) -> Image.Image:
    """The picture in a file.

    Args:
        source: the file, or what it holds.
        channels: 1 for mode "L", 3 for mode "RGB".
        name: how errors call it; by default its path.
        as_stored: as ``Image.open(file).convert("RGB")`` gives it, which is what torchvision, timm
            and RobustBench do: not turned, and transparency left out.

    Raises:
        UnreadableImage: there is no such file, it is damaged, or its pixels have no known range.
    """
    image_module = pillow()
    called = name or (str(source) if isinstance(source, Path) else "given as bytes")

    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if as_stored:
                return file.convert("L" if channels == 1 else "RGB")
            transparent = _transparent_level(file)
            file.load()
            if transparent is not None:
                file.info["transparency"] = transparent
            return as_picture(file, channels)
    except MemoryError:
        raise
    # A damaged file leads Pillow to errors of any kind: struct.error, zlib.error, IndexError, …
    except Exception as error:
        raise UnreadableImage(f"image {called} cannot be read: {_told(error)}") from error


def as_picture(image: Image.Image, channels: int) -> Image.Image:
    """A Pillow image of any mode as mode "L" (channels 1) or "RGB" (channels 3), upright.

    Raises:
        DataError: the mode's values have no known range, as 32-bit numbers, or Pillow does not
            convert them rightly.
    """
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3 to read pictures, got {channels}")
    kind = image.format or ""  # a picture that was turned has forgotten it
    _check_bits(image)
    if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)

    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_sixteen_bits(image, kind)
    if image.mode == "La":  # Pillow converts it to its sibling alone
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    if image.mode not in CONVERTED:
        raise DataError(f"pixels must be of mode {', '.join(CONVERTED)}, got {image.mode!r}")

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


def _from_sixteen_bits(image: Image.Image, kind: str) -> Image.Image:
    """Grey of 16 bits, rounded to 8. Pillow gives it as mode I;16, or in some formats as I."""
    values = np.asarray(image)
    is_known = image.mode.startswith("I;16") or (image.mode == "I" and kind in SCALED)
    if not is_known or values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise DataError(
            f"pixels must have 8 or 16 bits, got mode {image.mode!r} with values from "
            f"{values.min():g} to {values.max():g}, whose range nobody knows"
        )

    eight_bits = (values.astype(np.uint32) * 255 + SIXTEEN_BITS // 2) // SIXTEEN_BITS
    eight_bits[values == image.info.get("transparency", -1)] = 255  # this level is transparent
    return pillow().fromarray(eight_bits.astype(np.uint8))


def _check_bits(image: Image.Image) -> None:
    """DataError: 9 to 15 bits, which Pillow does not stretch to 16; or a transparent colour of
    RGB with 16 bits, which it compares with 8."""
    bits = max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,)))
    if 8 < bits < 16:
        raise DataError(f"pixels must have 8 or 16 bits, got {bits}")
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255:
        raise DataError(
            f"pixels of RGB with a transparent colour must have 8 bits, got 16, with {colour}"
        )


def _transparent_level(file: Image.Image) -> int | None:
    """The transparent level of a grey PNG of 2 or 4 bits, stretched to 8 as Pillow stretches its
    pixels. It must be asked before the file is loaded. None: that is no such file."""
    level = file.info.get("transparency")
    tiles = getattr(file, "tile", None)
    mode = tiles[0][3] if file.format == "PNG" and tiles else None
    stretch = {"L;2": 85, "L;4": 17}.get(mode) if isinstance(mode, str) else None
    return level * stretch if stretch is not None and isinstance(level, int) else None


def _told(error: Exception) -> str:
    """What an error says, and of what kind it is, if it is no error of a file."""
    if isinstance(error, OSError | SyntaxError | ValueError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _on_white(image: Image.Image) -> Image.Image:
    """What is seen of an image with transparency on a white page."""
    layers = image.convert("RGBA")
    page = pillow().new("RGBA", layers.size, "white")
    page.alpha_composite(layers)
    return page.convert("RGB")
