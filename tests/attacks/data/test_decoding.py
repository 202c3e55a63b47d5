"""Whatever an image file holds becomes an upright picture of 8 bits, or is refused by name."""

import io
import struct

import numpy as np
import pytest
from pictures import encoded, noise, png
from PIL import Image, ImageCms

from ironmoe.attacks.data import DataError, UnreadableImage
from ironmoe.attacks.data.decoding import as_picture, is_grey, read_image

LEVELS_16 = np.array([[0, 127, 128, 129, 300], [256, 257, 32767, 65407, 65535]], np.uint16)


def values(source, channels=3):
    return np.asarray(read_image(source, channels))


def rounded(levels):
    """16 bits to 8, to the nearest, in integers."""
    return ((levels.astype(np.int64) * 510 + 65535) // 131070).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_lossless_file_gives_its_pixels(kind, channels):
    picture = noise(5, 7, channels)
    held = encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    wanted = np.asarray(picture)
    found = values(held, 3)
    assert (found == (wanted if channels == 3 else wanted[..., None])).all()
    assert found.shape == (5, 7, 3)


def test_one_bit_becomes_black_and_white():
    bits = np.array([[True, False, True]])
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        assert values(encoded(Image.fromarray(bits), kind), 1).tolist() == [[255, 0, 255]]


def test_a_palette_is_looked_up():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        found = values(encoded(picture, kind))
        assert found.tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_transparency_lies_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    # a fifth of the colour and four fifths of white
    wanted = [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert values(encoded(Image.fromarray(rgba), kind, **options)).tolist() == wanted


def test_grey_with_transparency_lies_on_white():
    grey = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1))])
    grey.putpixel((0, 0), (100, 255))
    assert values(encoded(grey, "PNG"), 1).tolist() == [[100, 255]]
    assert values(encoded(grey, "PNG"), 3).tolist() == [[[100] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_is_white(kind):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    found = values(encoded(picture, kind, transparency=1))
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_each_entry_of_a_palette_may_be_as_transparent_as_it_likes():
    palette = (b"PLTE", bytes([0, 0, 0, 0, 100, 200, 7, 7, 7]))
    held = png(3, 1, 8, 3, [b"\0\1\2"], [palette, (b"tRNS", bytes([0, 51]))])
    assert values(held).tolist() == [[[255] * 3, [204, 224, 244], [7] * 3]]


def test_a_transparent_colour_is_white():
    held = png(2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], [(b"tRNS", struct.pack(">3H", 1, 2, 3))])
    assert values(held).tolist() == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize(("bits", "row", "levels"), [
    (1, b"\x50", [0, 255, 0, 255]),
    (2, b"\x1b", [0, 85, 170, 255]),
    (4, b"\x01\xaf", [0, 17, 170, 255]),
    (8, b"\x00\x11\xaa\xff", [0, 17, 170, 255]),
])  # fmt: skip
@pytest.mark.parametrize("transparent", [None, 1])
def test_grey_of_few_bits_is_stretched_and_one_level_may_be_transparent(
    bits, row, levels, transparent
):
    chunks = [] if transparent is None else [(b"tRNS", struct.pack(">H", transparent))]
    clear = None if transparent is None else transparent * 255 // (2**bits - 1)
    wanted = [255 if level == clear else level for level in levels]
    assert values(png(4, 1, bits, 0, [row], chunks), 1).tolist() == [wanted]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_rounded_to_eight(kind):
    assert (values(encoded(Image.fromarray(LEVELS_16), kind), 1) == rounded(LEVELS_16)).all()


def tiff(bits, data, width, height, order="<", photometric=1):
    """A TIFF file of grey; photometric: 0, white is zero; 1, black is."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 200),
            (278, height), (279, len(data))]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
        for tag, value in tags
    )
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return (head + entries + bytes(4)).ljust(200, b"\0") + data


def test_sixteen_bits_of_either_byte_order_are_the_same():
    for order in "<>":
        held = tiff(16, LEVELS_16.astype(f"{order}u2").tobytes(), 5, 2, order)
        assert (values(held, 1) == rounded(LEVELS_16)).all()


@pytest.mark.parametrize(("bits", "data", "levels"), [
    (1, b"\x40", [0, 255]), (4, b"\x0f", [0, 255]), (8, b"\x00\xc8", [0, 200]),
    (16, struct.pack("<2H", 0, 51400), [0, 200]),
])  # fmt: skip
def test_where_white_is_zero_the_levels_are_turned_round_whatever_the_bits(bits, data, levels):
    assert values(tiff(bits, data, 2, 1), 1).tolist() == [levels]
    negative = tiff(bits, data, 2, 1, photometric=0)
    assert values(negative, 1).tolist() == [[255 - level for level in levels]]
    assert values(negative, 3)[0, :, 1].tolist() == [255 - level for level in levels]


def test_where_white_is_zero_a_turned_picture_is_turned_round_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(ARROW.astype(np.uint16) * 257)
    black = encoded(deep, "TIFF", exif=exif)
    white = bytearray(black)
    at = white.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert white[at] == 1
    white[at] = 0
    assert (values(bytes(white), 1) == 255 - values(black, 1)).all()


def test_a_transparent_level_of_sixteen_bits_is_white():
    held = png(2, 1, 16, 0, [struct.pack(">2H", 600, 601)], [(b"tRNS", struct.pack(">H", 600))])
    assert values(held, 1).tolist() == [[255, 2]]


@pytest.mark.parametrize(("colour_type", "levels", "wanted"), [
    (2, [256 * 7, 0, 65535], [7, 0, 255]),
    (6, [256 * 7, 0, 65535, 65535], [7, 0, 255]),
    (6, [256 * 7, 0, 65535, 0], [255, 255, 255]),
    (4, [256 * 7, 65535], [7, 7, 7]),
])  # fmt: skip
def test_colours_of_sixteen_bits_keep_their_upper_eight(colour_type, levels, wanted):
    held = png(1, 1, 16, colour_type, [struct.pack(f">{len(levels)}H", *levels)])
    assert values(held).tolist() == [[wanted]]


@pytest.mark.parametrize("level", [1992, 5])
def test_a_transparent_colour_of_sixteen_bits_is_refused(level):
    row = struct.pack(">6H", level, 0, 0, 1, 2, 3)
    held = png(2, 1, 16, 2, [row], [(b"tRNS", struct.pack(">3H", level, 0, 0))])
    with pytest.raises(UnreadableImage, match="transparent colour must have 8 bits, got 16"):
        read_image(held, 3)


def test_twelve_bits_are_refused():
    with pytest.raises(UnreadableImage, match="pixels must have 8 or 16 bits, got 12"):
        read_image(tiff(12, bytes(6), 2, 2), 1)


def test_grey_levels_of_a_ppm_file_are_stretched():
    held = b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000)
    assert values(held, 1).tolist() == [[0, 128, 255]]
    assert values(b"P5 3 1 100\n" + bytes([0, 50, 100]), 1).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("numbers", [
    np.array([[0, 200]], np.int32), np.array([[-5, 200]], np.int32), np.array([[70000]], np.int32),
    np.array([[0.0, 1.0]], np.float32),
])  # fmt: skip
def test_numbers_of_32_bits_are_refused_since_their_range_is_unknown(numbers):
    picture = Image.fromarray(numbers)
    with pytest.raises(UnreadableImage, match=r"pixels must have 8 or 16 bits, got mode '[IF]'"):
        read_image(encoded(picture, "TIFF"), 1)
    with pytest.raises(DataError, match="range nobody knows"):
        as_picture(picture, 1)


def test_lab_is_refused_by_its_name():
    lab = Image.new("LAB", (2, 2), (100, 128, 128))
    with pytest.raises(DataError, match="got 'LAB'"):
        as_picture(lab, 3)
    srgb = ImageCms.createProfile("sRGB")
    to_lab = ImageCms.buildTransform(srgb, ImageCms.createProfile("LAB"), "RGB", "LAB")
    held = encoded(ImageCms.applyTransform(noise(2, 2), to_lab), "TIFF")
    with pytest.raises(UnreadableImage, match="got 'LAB'"):
        read_image(held, 3)


def test_every_mode_of_pillow_is_converted_or_refused():
    for mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                 "HSV", "I;16", "I;16B"):  # fmt: skip
        picture = Image.new(mode, (3, 2))
        for channels, wanted in ((1, "L"), (3, "RGB")):
            found = as_picture(picture, channels)
            assert (found.mode, found.size) == (wanted, (3, 2)), mode


def test_multiplied_alpha_lies_on_white():
    assert np.asarray(as_picture(Image.new("La", (1, 1), (0, 0)), 1)).tolist() == [[255]]
    assert np.asarray(as_picture(Image.new("RGBa", (1, 1)), 3)).tolist() == [[[255] * 3]]


def test_cmyk_becomes_rgb_whether_a_jpeg_inverts_it_or_not():
    """Adobe's JPEG files hold 255 − ink; those of TIFF hold ink."""
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        held = encoded(ink, kind)
        assert b"Adobe" in held or kind == "TIFF"
        red, green, blue = values(held)[4, 4].tolist()
        assert red < 5 and green > 250 and blue > 250


def test_jpegs_of_grey_and_of_other_colours_are_read():
    smooth = Image.linear_gradient("L").resize((16, 16))
    assert abs(values(encoded(smooth, "JPEG", quality=100), 1) - np.asarray(smooth, int)).max() < 4
    found = values(encoded(smooth, "JPEG", quality=100), 3).astype(int)
    assert (found[..., 0] == found[..., 2]).all()
    as_ycbcr = encoded(smooth.convert("RGB").convert("YCbCr"), "JPEG", quality=100)
    assert abs(values(as_ycbcr, 1) - np.asarray(smooth, int)).max() < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_pictures_counts(kind):
    first, second = Image.new("RGB", (6, 4), (255, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    held = encoded(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(held)) as file:
        assert file.n_frames == 2
    assert (values(held) == [255, 0, 0]).all()


def test_the_first_picture_of_an_mpo_file_counts():
    first, second = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "black")
    held = encoded(first, "MPO", save_all=True, append_images=[second])
    assert values(held).min() > 250


ARROW = np.array([[0, 50, 100], [150, 200, 250]], np.uint8)
# How a file that a camera held in this way lies; what undoes it, as EXIF 2.3 numbers it.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_as_their_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.fromarray(ARROW.repeat(16, 0).repeat(16, 1))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    found = values(encoded(large, kind, exif=exif, **options), 1)[8::16, 8::16]
    wanted = UPRIGHT[orientation](ARROW)
    assert found.shape == wanted.shape
    assert abs(found.astype(int) - wanted).max() < 4


@pytest.mark.parametrize("orientation", [6, 8])
def test_pictures_of_sixteen_bits_and_with_transparency_are_turned_too(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = Image.fromarray(ARROW.astype(np.uint16) * 257)
    assert (values(encoded(deep, "PNG", exif=exif), 1) == UPRIGHT[orientation](ARROW)).all()
    clear = Image.merge("LA", [Image.fromarray(ARROW), Image.new("L", (3, 2), 255)])
    assert (values(encoded(clear, "PNG", exif=exif), 1) == UPRIGHT[orientation](ARROW)).all()


def test_an_orientation_that_does_not_exist_changes_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert (values(encoded(Image.fromarray(ARROW), "PNG", exif=exif), 1) == ARROW).all()


def test_more_pixels_than_memory_are_refused(monkeypatch):
    held = encoded(Image.new("1", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_image(held, 1)


def test_grey_becomes_rgb_and_rgb_grey():
    grey = encoded(Image.new("L", (1, 1), 77), "PNG")
    assert values(grey, 3).tolist() == [[[77, 77, 77]]]
    # 0.299 R + 0.587 G + 0.114 B, of ITU-R BT.601
    colour = encoded(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG")
    assert values(colour, 1).tolist() == [[76]]


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(DataError, match="channels must be 1 or 3 to read pictures, got 4"):
        as_picture(noise(2, 2), 4)


def test_grey_files_are_known_before_they_are_read():
    deep = Image.fromarray(LEVELS_16)
    for picture, grey in ((noise(2, 2, 1), True), (noise(2, 2), False), (deep, True)):
        with Image.open(io.BytesIO(encoded(picture, "PNG"))) as file:
            assert is_grey(file) == grey
