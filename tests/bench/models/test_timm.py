"""``timm:NAME``: pixels, normalization and weights as timm has them."""

import math
import re

import pytest
import torch
import torchvision_rules as rules
from jpegs import write_jpegs
from libraries import library
from PIL import Image
from safetensors.torch import save_file
from timm_stand_in import MEAN, STD, Tiny, timm_with

from ironmoe.attacks.data.decoding import read_image
from ironmoe.bench.models.load import load_model
from ironmoe.moe import CheckpointError

CPU = torch.device("cpu")
# what pretrained_cfg says
CONFIGS = {
    "centre": {"input_size": (3, 24, 24), "crop_pct": 0.9, "interpolation": "bicubic"},
    "defaults": {},
    "centre, not square": {"input_size": (3, 24, 31), "crop_pct": 0.875},
    "all of it": {"input_size": (3, 29, 29), "crop_pct": 1.0, "interpolation": "bilinear"},
    "squash": {"input_size": (3, 24, 24), "crop_pct": 0.95, "crop_mode": "squash"},
    "squash, all": {"input_size": (3, 24, 20), "crop_pct": 1.0, "crop_mode": "squash"},
    "border": {
        "input_size": (3, 26, 26),
        "crop_pct": 0.9,
        "crop_mode": "border",
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    "border, all": {"input_size": (3, 26, 22), "crop_pct": 1.0, "crop_mode": "border"},
    "border, as crop_pct over 1": {"input_size": (3, 26, 26), "crop_pct": 1.1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_jpegs(tmp_path_factory.mktemp("jpegs"))


def of_timm(picture, config):
    """The values that timm's evaluation transforms give, by its documentation."""
    _, height, width = config.get("input_size", (3, 224, 224))
    share = config.get("crop_pct", 0.875)
    larger = math.floor(height / share), math.floor(width / share)
    how = config.get("interpolation", "bicubic")
    mode = config.get("crop_mode", "center")
    fill = 0
    if mode == "squash":
        picture = rules.exact(picture, larger, how)
    elif mode == "border" or larger[0] != larger[1]:
        ratios = [have / want for have, want in zip(picture.size[::-1], larger, strict=True)]
        ratio = max(ratios) if mode == "border" else min(ratios)
        picture = rules.exact(picture, [round(n / ratio) for n in picture.size[::-1]], how)
        fill = [round(255 * v) for v in config.get("mean", MEAN)] if mode == "border" else 0
    else:
        picture = rules.shorter_edge(picture, larger[0], how)
    values = rules.centre(picture, (height, width), fill)
    return rules.normalized(values, config.get("mean", MEAN), config.get("std", STD))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_timms_rules(name, files, monkeypatch):
    config = CONFIGS[name]
    timm_with(monkeypatch, tiny=config)
    loaded = load_model(None, "timm:tiny", CPU)
    model = Tiny(3, 5, config).double()
    model.load_state_dict(loaded.model.model.state_dict())
    for file in files:
        pixels = loaded.pipeline(read_image(file, 3))
        assert loaded.pipeline.size == tuple(pixels.shape[1:])
        inputs = torch.from_numpy(of_timm(Image.open(file).convert("RGB"), config))
        with torch.no_grad():
            ours, theirs = loaded.model(pixels[None].float() / 255), model(inputs[None])
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
        shares = (pixels.double() / 255 - loaded.model.mean) / loaded.model.std
        torch.testing.assert_close(shares, inputs, rtol=0, atol=1e-5)  # not a pixel differs


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_logits_are_those_of_timm_itself(name, files):
    timm = library("timm")
    data = library("timm.data")
    loaded = load_model(None, f"timm:{name}", CPU)
    model = timm.create_model(name).eval()
    model.load_state_dict(loaded.model.model.state_dict())
    config = data.resolve_data_config({}, model=model)
    transform = data.create_transform(**config, is_training=False)
    for file in files:
        inputs = transform(Image.open(file).convert("RGB"))
        pixels = loaded.pipeline(read_image(file, 3))
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.model(pixels[None].float() / 255), model(inputs[None]), rtol=1e-4, atol=1e-4
            )


def test_weights_come_from_a_file_and_else_are_called_random(monkeypatch, tmp_path):
    timm_with(monkeypatch, tiny={})
    model = Tiny(3, 7, {})
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    torch.save(wrapped, tmp_path / "tiny.pth")
    for name in ("tiny.safetensors", "tiny.pth"):
        spec = f"timm:tiny.in1k?num_classes=7&checkpoint={tmp_path / name}"
        loaded = load_model(None, spec, CPU)
        assert torch.equal(loaded.model.model.head.weight, model.head.weight)
        assert loaded.name == "tiny.in1k" and loaded.facts["weights"] == name
    assert load_model(None, "timm:tiny", CPU).name == "tiny (random weights)"


def test_a_model_of_one_size_is_built_for_that_of_the_data(monkeypatch):
    timm_with(monkeypatch, vit={"input_size": (3, 16, 16), "crop_pct": 1.0}, resnet={})
    own = load_model(None, "timm:vit", CPU)
    assert own.pipeline.size == own.model.model.img_size == (16, 16)
    for spec in ("timm:vit", "timm:resnet"):
        loaded = load_model(None, spec, CPU, image_size=(24, 24))
        assert loaded.pipeline.size == (24, 24)
        assert loaded.model(torch.rand(2, 3, 24, 24)).shape == (2, 5)
    asked = load_model(None, "timm:vit?img_size=32", CPU, image_size=(24, 24))
    assert asked.pipeline.size == asked.model.model.img_size == (32, 32)


TESTED = {"input_size": (3, 16, 16), "crop_pct": 0.5, "test_input_size": (3, 20, 20)}


def test_the_size_of_tests_is_told_and_taken_where_it_is_asked_for(monkeypatch):
    timm_with(
        monkeypatch,
        tiny=TESTED | {"test_crop_pct": 1.0},
        same=TESTED | {"test_input_size": (3, 16, 16)},
        share={"input_size": (3, 16, 16), "test_crop_pct": 0.8},
        vit=TESTED | {"fixed_input_size": True},
        none={},
    )
    told = load_model(None, "timm:tiny", CPU).preprocessing
    assert told.startswith("shorter edge to 32 (bicubic), centre 16 × 16")
    assert "it names 20 × 20 and crop_pct 1 for tests, which" in told and "test_size=true" in told
    for name in ("same", "none"):
        assert "tests" not in load_model(None, f"timm:{name}", CPU).preprocessing

    tested = load_model(None, "timm:tiny?test_size=true", CPU, image_size=(24, 24)).preprocessing
    assert tested.startswith("shorter edge to 20 (bicubic), centre 20 × 20")
    assert tested.endswith("(pretrained_cfg of timm)")
    share = load_model(None, "timm:share?test_size=true", CPU).preprocessing
    assert share.startswith("shorter edge to 20 (bicubic), centre 16 × 16")
    built = load_model(None, "timm:vit?test_size=true", CPU)
    assert built.model.model.img_size == built.pipeline.size == (20, 20)
    with pytest.raises(CheckpointError, match="must have a test_input_size or test_crop_pct"):
        load_model(None, "timm:none?test_size=true", CPU)


def test_one_channel_gets_the_means_of_three(monkeypatch):
    timm_with(monkeypatch, tiny={"input_size": (3, 24, 24)})
    loaded = load_model(None, "timm:tiny?in_chans=1", CPU)
    assert loaded.pipeline.channels == 1 and loaded.model(torch.rand(2, 1, 24, 24)).shape == (2, 5)
    assert loaded.pipeline.mean == pytest.approx([sum(MEAN) / 3])
    assert "averaged" in loaded.preprocessing


WRONG = {
    "unknown": ("timm:tinny", "must name a model of timm 1.0, got 'tinny'; close: tiny"),
    "argument": ("timm:tiny?wings=2", "unexpected keyword argument 'wings'"),
    "pretrained": ("timm:tiny?pretrained=true", "nothing is downloaded. To get the file"),
    "no file": ("timm:tiny?checkpoint=no.pth", "checkpoint no.pth does not exist"),
    "crop": ("timm:odd", "crop_mode of Tiny must be one of center, squash, border, got 'fish'"),
    "value": ("timm:tiny?num_classes", "got 'num_classes' without a value"),
    "twice": ("timm:tiny?a=1&a=2", "got 'a' twice"),
    "size": ("timm:tiny?img_size=big", "must have an img_size such as 224, or 224x192 for height"),
    "arrays": ("timm:tiny?checkpoint=a.npz", "If it is a ViT of the official code, vmoe:a.npz"),
    "dtype": ("timm:tiny?dtype=int8", "of dtype float32, bfloat16, float16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, monkeypatch):
    timm_with(monkeypatch, tiny={}, odd={"crop_mode": "fish"})
    spec, message = WRONG[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(None, spec, CPU)
