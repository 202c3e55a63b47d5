"""Files that are damaged, or no images: unreadable, by their names."""

import numpy as np
import pytest
from pictures import encoded, noise, png

from ironmoe.attacks.data import UnreadableImage
from ironmoe.attacks.data.decoding import read_image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_files_are_unreadable(kind):
    held = encoded(noise(40, 40), kind)
    with pytest.raises(UnreadableImage, match=r"^image given as bytes cannot be read: .+"):
        read_image(held[: len(held) // 2], 3)


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_without_its_end_is_unreadable_and_what_follows_the_end_is_not(options, as_stored):
    small = encoded(noise(8, 8), "JPEG")  # as cameras put one into the header
    held = encoded(noise(80, 80), "JPEG", comment=small, **options)
    half = len(held) // 2
    assert held.index(small) + len(small) < half
    for rest in (bytes(half), b"\x55" * half):
        with pytest.raises(UnreadableImage, match="a JPEG must have its end marker, FF D9, got"):
            read_image(held[:half] + rest, 3, as_stored=as_stored)
    for rest in (b"\0", bytes(1000), b"\x55" * 3):
        picture = read_image(held + rest, 3, as_stored=as_stored)
        assert (np.asarray(picture) == np.asarray(read_image(held, 3))).all()


def test_a_palette_that_is_not_there_is_missed():
    with pytest.raises(UnreadableImage, match="a picture of mode 'P' must have a palette, got no"):
        read_image(png(3, 1, 8, 3, [b"\0\1\2"]), 3)


def test_a_file_in_memory_is_not_told_by_its_address():
    with pytest.raises(UnreadableImage) as caught:
        read_image(b"words", 3, "row 3")
    assert str(caught.value) == "image row 3 cannot be read: cannot identify image file"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_files_give_a_picture_or_the_error_for_them_and_no_other(kind):
    whole = bytearray(encoded(noise(12, 12), kind))
    generator = np.random.default_rng(7)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 200), 3):
            damaged[place] = generator.integers(256)
        try:
            assert read_image(bytes(damaged), 3).mode == "RGB"
        except UnreadableImage as error:
            assert str(error).startswith("image given as bytes cannot be read: ")


@pytest.mark.parametrize("held", [b"", b"an image, but of words\n", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_images_are_unreadable_by_their_name(held, tmp_path):
    path = tmp_path / "wörter und so.jpg"
    path.write_bytes(held)
    with pytest.raises(UnreadableImage, match=r"wörter und so\.jpg cannot be read"):
        read_image(path, 3)


def test_missing_files_and_folders_are_unreadable(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(UnreadableImage, match="cannot be read"):
            read_image(path, 3)
