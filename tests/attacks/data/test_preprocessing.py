"""Resize and crop by torchvision's rules: against these rules written down in numpy, and against
torchvision where it can be imported."""

import math

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from ironmoe.attacks.data import DataError, Preprocessing
from ironmoe.attacks.data.preprocessing import INTERPOLATIONS

SIZES = [(31, 47), (47, 31), (33, 33), (8, 8), (1, 40), (40, 1), (1, 1), (500, 3), (224, 225)]
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def shorter_edge(picture, length, resample):
    """Documentation of torchvision's Resize: "If size is an int, smaller edge of the image will be
    matched to this number. i.e, if height > width, then image will be rescaled to (size * height /
    width, size)", with the longer edge rounded down."""
    width, height = picture.size
    if width <= height:
        size = (length, math.floor(length * height / width))
    else:
        size = (math.floor(length * width / height), length)
    return picture.resize(size, resample)


def middle(values, height, width):
    """(height, width) around the centre of (h, w, c): black is laid around what is too small, more
    of it below and on the right; the corner is rounded to the even pixel."""
    for axis, wanted in ((0, height), (1, width)):
        lacking = max(wanted - values.shape[axis], 0)
        rims = [(0, 0)] * 3
        rims[axis] = (lacking // 2, lacking - lacking // 2)
        values = np.pad(values, rims)
    twice_top, twice_left = values.shape[0] - height, values.shape[1] - width
    top, left = (half // 2 + (half % 2 and half // 2 % 2) for half in (twice_top, twice_left))
    return values[top : top + height, left : left + width]


def written_down(picture, resize, crop, interpolation):
    """(C, height, width) of the rules."""
    resample = RESAMPLE[interpolation]
    if isinstance(resize, int):
        picture = shorter_edge(picture, resize, resample)
    elif resize is not None:
        picture = picture.resize(resize[::-1], resample)
    values = np.asarray(picture).reshape(picture.height, picture.width, -1)
    return (values if crop is None else middle(values, *crop)).transpose(2, 0, 1)


def ours(resize, crop, interpolation, channels):
    edge = (resize, resize) if isinstance(resize, int) else resize
    mode = "shortest" if isinstance(resize, int) else "exact"
    return Preprocessing(
        channels=channels, resize=edge, mode=mode, crop=crop, interpolation=interpolation
    )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_rules(interpolation, channels):
    for number, size in enumerate(SIZES):
        picture = noise(*size, channels, seed=number)
        for resize in (None, 32, 33, (20, 30)):
            if resize is not None and max(size) / min(size) > 100:
                continue  # thousands of pixels of one
            for crop in (None, (32, 32), (31, 28), (64, 7), (1, 1)):
                found = ours(resize, crop, interpolation, channels)(picture)
                wanted = written_down(picture, resize, crop, interpolation)
                assert found.dtype == torch.uint8 and found.is_contiguous()
                assert np.array_equal(found.numpy(), wanted), (size, resize, crop)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_pixels_are_those_of_torchvision(interpolation):
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch
        pytest.skip(f"needs torchvision: {error}")

    mode = transforms.InterpolationMode(interpolation)
    for number, size in enumerate(SIZES):
        picture = noise(*size, seed=number)
        for resize in (32, 33, (20, 30)):
            for crop in ((32, 32), (31, 28), (64, 7), (1, 1)):
                theirs = transforms.Compose([
                    transforms.Resize(resize, interpolation=mode),
                    transforms.CenterCrop(crop),
                    transforms.PILToTensor(),
                ])  # fmt: skip
                assert torch.equal(ours(resize, crop, interpolation, 3)(picture), theirs(picture))


def test_half_a_pixel_is_rounded_to_the_even_side():
    """By hand: rows 0 … 6, 4 of them from 1.5 on, which is 2; of 5 from 0.5 on, which is 0."""
    rows = Image.fromarray(np.arange(7, dtype=np.uint8)[:, None])
    assert Preprocessing(channels=1, crop=(4, 1))(rows)[0, :, 0].tolist() == [2, 3, 4, 5]
    rows = Image.fromarray(np.arange(5, dtype=np.uint8)[:, None])
    assert Preprocessing(channels=1, crop=(4, 1))(rows)[0, :, 0].tolist() == [0, 1, 2, 3]


def test_a_picture_of_the_wanted_size_keeps_its_pixels():
    picture = noise(24, 36)
    wanted = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for mode, size in (("shortest", (24, 24)), ("exact", (24, 36)), ("longest", (24, 36)),
                       ("square", (24, 36))):  # fmt: skip
        options = {"resize": size, "mode": mode, "interpolation": "lanczos"}
        assert torch.equal(Preprocessing(**options)(picture), wanted), mode
    assert torch.equal(Preprocessing()(picture), wanted)


def test_half_a_pixel_is_rounded_down_where_that_is_asked_for():
    rows = Image.fromarray(np.arange(7, dtype=np.uint8)[:, None])
    down = {"channels": 1, "centre": "down"}
    assert Preprocessing(crop=(4, 1), **down)(rows)[0, :, 0].tolist() == [1, 2, 3, 4]
    one = Image.new("L", (1, 1), 255)
    assert Preprocessing(crop=(2, 1), **down)(one)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["exact", "square"])
@pytest.mark.parametrize("size", SIZES)
def test_exact_sizes_are_known_ahead(mode, size):
    pipeline = Preprocessing(resize=(9, 14), mode=mode)
    assert pipeline.size == (9, 14)
    assert pipeline(noise(*size)).shape == (3, 9, 14)


@pytest.mark.parametrize("size", SIZES)
def test_both_edges_reach_what_they_must(size):
    height, width = size
    shortest = Preprocessing(resize=(9, 14), mode="shortest")(noise(*size)).shape[1:]
    longest = Preprocessing(resize=(9, 14), mode="longest")(noise(*size)).shape[1:]
    # A kept ratio is met to half a pixel, and no edge vanishes.
    large, small = max(9 / height, 14 / width), min(9 / height, 14 / width)
    assert shortest == (max(1, round(height * large)), max(1, round(width * large)))
    assert longest == (max(1, round(height * small)), max(1, round(width * small)))
    assert shortest[0] >= 9 and shortest[1] >= 14 and longest[0] <= 9 and longest[1] <= 14


def test_what_a_picture_lacks_has_the_colour_that_was_asked_for():
    pipeline = Preprocessing(crop=(3, 3), fill=(10, 20, 30))
    found = pipeline(Image.new("RGB", (1, 1), "white"))
    assert found[:, 1, 1].tolist() == [255] * 3 and found[:, 0, 2].tolist() == [10, 20, 30]
    grey = Preprocessing(channels=1, crop=(2, 2), fill=(7,))(Image.new("L", (1, 1), 255))
    assert grey.tolist() == [[[255, 7], [7, 7]]]


@pytest.mark.parametrize(("options", "match"), [
    ({"interpolation": "cubic"}, "interpolation must be one of nearest, .*, got 'cubic'"),
    ({"mode": "squash"}, "mode must be one of .*, got 'squash'"),
    ({"crop": (0, 5)}, "crop must be a height and a width above 0"),
    ({"resize": (5,)}, "resize must be a height and a width above 0"),
    ({"mean": (0.5,)}, "mean must have a number for each of 3 channels"),
    ({"std": (0.5, 0, 0.5)}, "std must be above 0"),
    ({"fill": (0, 0)}, "fill must have a number from 0 to 255 for each of 3 channels"),
    ({"fill": (0, 0, 256)}, "fill must have a number from 0 to 255 for each of 3 channels"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(options, match):
    with pytest.raises(DataError, match=match):
        Preprocessing(**options)


def test_one_line_says_what_is_done():
    whole = Preprocessing(resize=(256, 256), crop=(224, 224), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert str(whole) == (
        "shorter edge to 256 (bilinear), centre 224 × 224, mean (0.5, 0.5, 0.5), "
        "std (0.25, 0.25, 0.25)"
    )
    assert str(Preprocessing()) == "as they are"
    assert whole.with_(crop=None).crop is None and whole.as_dict()["crop"] == [224, 224]
