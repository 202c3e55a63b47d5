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

from ironmoe.attacks.data.errors import DataError, UnreadableImage, without_addresses

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
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
SCAN_OF_JPEG, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"
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
            _check_file(file, source)
            if as_stored:
                return file.convert("L" if channels == 1 else "RGB")
            _check_transparent_colour(file)
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


def as_picture(image: Image.Image, channels: int, *, of_file: bool = True) -> Image.Image:
    """A Pillow image of any mode as mode "L" (channels 1) or "RGB" (channels 3).

    Args:
        image: as Pillow read it, or as somebody made it.
        channels: 1 or 3.
        of_file: what its file says beside the pixels counts: its orientation, its transparent
            colour, and whether white is zero. False: the pixels are what somebody made of them.
            Pillow still carries what the file said.

    Raises:
        DataError: the mode's values have no known range, as 32-bit numbers, or Pillow does not
            convert them rightly.
    """
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3 to read pictures, got {channels}")
    kind = image.format or ""  # a picture that was turned has forgotten it
    _check_bits(image)
    is_negative = of_file and _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO
    if not of_file and image.mode != "P" and "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    if of_file and image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)

    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_sixteen_bits(image, kind, is_negative)
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


def _from_sixteen_bits(image: Image.Image, kind: str, is_negative: bool) -> Image.Image:
    """Grey of 16 bits, rounded to 8. Pillow gives it as mode I;16, or in some formats as I; and as
    it is stored, where white is zero, though it inverts such a picture of fewer bits."""
    values = np.asarray(image)
    is_known = image.mode.startswith("I;16") or (image.mode == "I" and kind in SCALED)
    if not is_known or values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise DataError(
            f"pixels must have 8 or 16 bits, got mode {image.mode!r} with values from "
            f"{values.min():g} to {values.max():g}, whose range nobody knows"
        )

    eight_bits = (values.astype(np.uint32) * 255 + SIXTEEN_BITS // 2) // SIXTEEN_BITS
    if is_negative:
        eight_bits = 255 - eight_bits
    eight_bits[values == image.info.get("transparency", -1)] = 255  # this level is transparent
    return pillow().fromarray(eight_bits.astype(np.uint8))


def _check_file(file: Image.Image, source: Path | bytes) -> None:
    """DataError: a file that lacks a part, of which Pillow says nothing: it makes grey or black
    pixels of it."""
    if file.format == "PNG" and file.mode == "P" and file.palette is None:
        raise DataError("a picture of mode 'P' must have a palette, got none")
    if file.format in ("JPEG", "MPO") and not _has_end(source):
        raise DataError("a JPEG must have its end marker, FF D9, got none: a part of it is missing")


def _has_end(source: Path | bytes) -> bool:
    """Whether a JPEG ends by its marker; what follows it does not count. In the pixels no such
    marker can be, but a small picture in the header has one, too."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        file.seek(-len(END_OF_JPEG), io.SEEK_END)
        if file.read() == END_OF_JPEG:
            return True
        file.seek(0)
        held = file.read()

    place = 2  # after the marker of its beginning
    while held[place : place + 1] == b"\xff" and held[place : place + 2] != SCAN_OF_JPEG:
        length = held[place + 2 : place + 4]
        place += 1 if held[place + 1 : place + 2] == b"\xff" else 2 + int.from_bytes(length, "big")
    return held.rfind(END_OF_JPEG) > place


def _check_transparent_colour(file: Image.Image) -> None:
    """DataError: a transparent colour of 16 bits, which Pillow compares with 8. This must be asked
    before the file is loaded."""
    colour = file.info.get("transparency")
    if isinstance(colour, tuple) and _raw_mode(file) == "RGB;16B":
        raise DataError(
            f"pixels of RGB with a transparent colour must have 8 bits, got 16, with {colour}"
        )


def _check_bits(image: Image.Image) -> None:
    """DataError: 9 to 15 bits, which Pillow does not stretch to 16."""
    bits = max(_tags(image).get(BITS_PER_SAMPLE, (8,)))
    if 8 < bits < 16:
        raise DataError(f"pixels must have 8 or 16 bits, got {bits}")


def _tags(image: Image.Image) -> Any:
    """The tags of a TIFF file; of others none."""
    return getattr(image, "tag_v2", {})


def _raw_mode(file: Image.Image) -> str:
    """How the pixels of a PNG lie in its file; of others nothing."""
    tiles = getattr(file, "tile", None)
    mode = tiles[0][3] if file.format == "PNG" and tiles else None
    return mode if isinstance(mode, str) else ""


def _transparent_level(file: Image.Image) -> int | None:
    """The transparent level of a grey PNG of 2 or 4 bits, stretched to 8 as Pillow stretches its
    pixels. It must be asked before the file is loaded. None: that is no such file."""
    level = file.info.get("transparency")
    stretch = {"L;2": 85, "L;4": 17}.get(_raw_mode(file))
    return level * stretch if stretch is not None and isinstance(level, int) else None


def _told(error: Exception) -> str:
    """What an error says, and of what kind it is, if it is no error of a file."""
    said = without_addresses(str(error))
    if isinstance(error, OSError | SyntaxError | ValueError):
        return said or type(error).__name__
    return f"{type(error).__name__}: {said}"


def _on_white(image: Image.Image) -> Image.Image:
    """What is seen of an image with transparency on a white page."""
    layers = image.convert("RGBA")
    page = pillow().new("RGBA", layers.size, "white")
    page.alpha_composite(layers)
    return page.convert("RGB")
