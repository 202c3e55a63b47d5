"""``--resize --crop --interpolation --mean --std`` in place of what the model says."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ironmoe.attacks.data import image_folder
from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.bench.attack.attacked_images import pipeline_for
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.tensorflow_resize import TensorFlowResize
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.overrides import Overrides
from ironmoe.moe import CheckpointError

RULES = Preprocessing(
    resize=(256, 256), crop=(224, 224), mean=(0.1, 0.2, 0.3), std=(1, 2, 3), source="the model"
)


def loaded(pipeline=RULES, shape=None):
    model = Classifier(nn.Flatten(), [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    return LoadedModel(model, "tiny", shape, None, {}, pipeline=pipeline)


def told(pipeline=RULES, shape=None, **options):
    return str(Overrides.parse(**options).apply(loaded(pipeline, shape)).pipeline)


NUMBERS = ", mean (0.1, 0.2, 0.3), std (1, 2, 3)"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, f"shorter edge to 256 (bilinear), centre 224 × 224{NUMBERS}"),
        ({"resize": "232"}, f"shorter edge to 232 (bilinear), centre 224 × 224{NUMBERS}"),
        ({"resize": "232x300"}, f"stretched to 232 × 300 (bilinear), centre 224 × 224{NUMBERS}"),
        ({"resize": "232,300"}, f"stretched to 232 × 300 (bilinear), centre 224 × 224{NUMBERS}"),
        ({"resize": "none"}, f"centre 224 × 224{NUMBERS}"),
        ({"resize": "none", "crop": "none"}, f"as they are{NUMBERS}"),
        ({"crop": "192"}, f"shorter edge to 256 (bilinear), centre 192 × 192{NUMBERS}"),
        ({"crop": "200x192"}, f"shorter edge to 256 (bilinear), centre 200 × 192{NUMBERS}"),
        ({"interpolation": "box"}, f"shorter edge to 256 (box), centre 224 × 224{NUMBERS}"),
        (
            {"mean": "0.5", "std": "0.25,0.5,1"},
            "shorter edge to 256 (bilinear), centre 224 × 224, mean (0.5, 0.5, 0.5), "
            "std (0.25, 0.5, 1)",
        ),
    ],
)
def test_what_is_said_replaces_what_the_model_says_and_the_rest_stays(options, expected):
    assert told(**options) == expected


def test_pixels_change_as_they_are_told_to():
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    overrides = Overrides.parse(resize="30x20", crop="10x8", interpolation="bicubic")
    pixels = overrides.apply(loaded()).pipeline(picture)
    resized = np.array(picture.resize((20, 30), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels.numpy().transpose(1, 2, 0), resized[10:20, 6:14])


def test_mean_and_std_change_the_model():
    pixels = torch.rand(2, 3, 2, 2)
    changed = Overrides.parse(mean="0.5", std="0.25,0.5,1").apply(loaded())
    expected = (pixels - 0.5) / torch.tensor([0.25, 0.5, 1]).view(3, 1, 1)
    torch.testing.assert_close(changed.model(pixels), expected.flatten(1))

    only_std = Overrides.parse(std="0.5").apply(loaded()).model(pixels)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(only_std, ((pixels - mean) / 0.5).flatten(1))


def test_a_model_that_says_nothing_gets_what_the_user_says():
    own = LoadedModel(nn.Flatten(), "own", None, None, {})
    made = Overrides.parse(resize="40", crop="32", mean="0.5", std="0.5").apply(own)
    assert str(made.pipeline) == (
        "shorter edge to 40 (bilinear), centre 32 × 32, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    )
    assert made.preprocessing.endswith("(--resize, --crop, --mean, --std)")
    pixels = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(made.model(pixels), (2 * pixels - 1).flatten(1))
    assert Overrides().apply(own) is own


def test_mean_and_std_alone_leave_pictures_as_the_model_has_them(tmp_path):
    """A model that says nothing gets the centre square of each picture, in --image-size."""
    for name, size in (("a", (30, 50)), ("b", (41, 20))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "1.png")
    own = LoadedModel(nn.Flatten(), "own", None, None, {})
    made = Overrides.parse(mean="0.5", std="0.5").apply(own)
    images = image_folder(tmp_path)
    for given, side in ((None, 32), (24, 24)):
        pipeline = pipeline_for(images, made, given)
        assert pipeline.size == (side, side)
        half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        assert pipeline == pipeline_for(images, own, given).with_(**half)
    pixels = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(made.model(pixels), (2 * pixels - 1).flatten(1))
    assert made.facts == {"mean": (0.5,), "std": (0.5,)}


@pytest.mark.parametrize("channels", [1, 3])
def test_one_number_holds_for_any_channels_of_a_model_that_says_nothing(channels):
    pixels = torch.rand(2, channels, 4, 4)
    own = LoadedModel(nn.Flatten(), "own", None, None, {})
    model = Overrides.parse(mean="0.25").apply(own).model
    torch.testing.assert_close(model(pixels), (pixels - 0.25).flatten(1))


def test_three_numbers_of_one_option_spread_the_other():
    pixels = torch.rand(2, 3, 4, 4)
    own = LoadedModel(nn.Flatten(), "own", None, None, {})
    model = Overrides.parse(mean="0.1,0.2,0.3", std="0.5").apply(own).model
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(model(pixels), expected.flatten(1))
    with pytest.raises(CheckpointError, match="must get images with 3 channels, got 1"):
        model(pixels[:, :1])


def test_one_channel_that_is_known_is_not_taken_for_three():
    grey = LoadedModel(nn.Flatten(), "own", (1, 4, 4), None, {})
    model = Overrides.parse(mean="0.25").apply(grey).model
    with pytest.raises(CheckpointError, match="must get images with 1 channels, got 3"):
        model(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        (None, "tiny says nothing of how pictures are resized"),
        (TensorFlowResize((32, 32)), "is all or nothing"),
        (Preprocessing(crop=(32, 32)), "pictures are not resized for tiny"),
    ],
)
def test_interpolation_alone_says_why_it_needs_a_resize(pipeline, why):
    message = rf"--interpolation nearest must come with --resize: .*{why}"
    with pytest.raises(UserError, match=message):
        told(pipeline, interpolation="nearest")
    assert "(nearest)" in told(pipeline, interpolation="nearest", resize="40")


def test_a_model_of_one_size_sees_that_size_whatever_the_resize():
    grey = LoadedModel(nn.Flatten(), "own", (1, 28, 28), None, {})
    made = Overrides.parse(resize="32").apply(grey).pipeline
    assert str(made) == "shorter edge to 32 (bilinear), centre 28 × 28" and made.channels == 1
    assert str(Overrides.parse(resize="28x28").apply(grey).pipeline) == (
        "stretched to 28 × 28 (bilinear)"
    )


def test_a_model_of_one_size_refuses_another():
    own = LoadedModel(nn.Flatten(), "own", (1, 28, 28), None, {})
    message = "--resize, --crop must end at the 28 × 28 pixels that own takes, got 24 × 24"
    with pytest.raises(UserError, match=message):
        Overrides.parse(resize="28", crop="24").apply(own)


def test_a_pipeline_that_is_no_rules_gives_way_but_for_its_size():
    official = TensorFlowResize((384, 384), source="the official code")
    assert told(official, resize="400") == "shorter edge to 400 (bilinear), centre 384 × 384"
    kept = Overrides.parse(mean="0.5").apply(loaded(official))
    assert kept.pipeline is official
    assert kept.model.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "big"}, "--resize must be pixels above 0: 256 for the shorter edge"),
        ({"resize": "0"}, "--resize must be pixels above 0"),
        ({"resize": "1x2x3"}, "got '1x2x3'"),
        ({"crop": "-5"}, "--crop must be pixels above 0: 256 for a square"),
        ({"crop": "2.5"}, "got '2.5'"),
        ({"interpolation": "magic"}, "--interpolation must be one of nearest, box"),
        ({"mean": "red"}, "--mean must be one or several numbers at least 0 and at most 1, the"),
        ({"mean": "-0.1"}, "--mean must be one or several numbers at least 0"),
        ({"mean": "127.5"}, "got '127.5'; for these of 255 levels give 0.5"),
        ({"std": "58.4,57.1,57.4"}, "for these of 255 levels give 0.229,0.2239,0.2251"),
        ({"mean": "nan"}, "--mean must be one or several numbers"),
        ({"std": "0"}, "--std must be one or several numbers above 0 and at most 1"),
        ({"mean": "0,1"}, "--mean must be one number, or one for each of 3 channels, got 0.0, 1.0"),
        ({"interpolation": "box", "resize": "none"}, "--interpolation box must come with --resize"),
    ],
)
def test_what_is_wrong_names_the_option(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Overrides.parse(**options).apply(loaded())


def test_a_shorter_edge_in_place_of_stretching_is_cropped_to_what_the_model_takes():
    stretched = Preprocessing(resize=(32, 32), mode="exact", source="own")
    loaded = LoadedModel(nn.Flatten(), "m", None, None, {}, pipeline=stretched)
    for text, crop, expected in (
        ("40", None, (32, 32)),
        ("40", "36", (36, 36)),
        ("40", "none", None),
    ):
        rules = Overrides.parse(resize=text, crop=crop).apply(loaded).pipeline
        assert rules.resize == (40, 40) and rules.mode == "shortest" and rules.crop == expected
    assert Overrides.parse(resize="40x44").apply(loaded).pipeline.size == (40, 44)
