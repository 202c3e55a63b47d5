"""``torchvision:NAME``: the preset of the weights, and weights from disk alone."""

import re
from enum import Enum

import pytest
import torch
import torchvision_rules as rules
from jpegs import write_jpegs
from libraries import library, stand_in
from PIL import Image
from torch import nn

from ironmoe.attacks.data.decoding import read_image
from ironmoe.bench.models.load import load_model
from ironmoe.moe import CheckpointError

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = ["tench", "goldfish", "great white shark"]


class Interpolation(Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Preset:
    """What a preset of torchvision knows."""

    def __init__(self, crop, resize, interpolation):
        self.crop_size, self.resize_size = [crop], [resize]
        self.mean, self.std, self.interpolation = MEAN, STD, interpolation


class Weights(Enum):
    V1 = ("https://example.org/models/tiny-0a1b.pth", 28, 33, Interpolation.BILINEAR)
    V2 = ("https://example.org/models/tiny-2c3d.pth", 24, 29, Interpolation.BICUBIC)
    DEFAULT = V2

    @property
    def url(self):
        return self.value[0]

    @property
    def meta(self):
        return {"categories": NAMES}

    def transforms(self):
        return Preset(*self.value[1:])

    def __str__(self):
        return f"Tiny_Weights.{self.name}"


class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(torch.cat([x.mean((2, 3)), x[:, :, 0, -1]], 1))


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """A small torchvision, and torch.hub's folder in ``tmp_path``."""

    def get_model(name, weights=None, num_classes=1000):
        model = Tiny(num_classes if weights is None else len(weights.meta["categories"]))
        if weights is not None:
            state = torch.hub.load_state_dict_from_url(weights.url, weights_only=True)
            model.load_state_dict(state)
        return model

    def get_model_weights(name):
        if name not in ("tiny", "other"):
            raise ValueError(f"Unknown model {name}")
        return Weights

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    stand_in(monkeypatch, "torchvision")
    stand_in(
        monkeypatch,
        "torchvision.models",
        get_model=get_model,
        get_model_weights=get_model_weights,
        list_models=lambda: ["tiny", "other"],
    )
    (tmp_path / "checkpoints").mkdir()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_jpegs(tmp_path_factory.mktemp("jpegs"))


@pytest.mark.parametrize(("name", "crop", "edge", "how"), [
    ("V1", 28, 33, "bilinear"), ("V2", 24, 29, "bicubic"), ("DEFAULT", 24, 29, "bicubic"),
])  # fmt: skip
def test_logits_are_those_of_the_preset(name, crop, edge, how, files, torchvision, tmp_path):
    model = Tiny(3)
    file = Weights[name].url.rpartition("/")[2]
    torch.save(model.state_dict(), tmp_path / "checkpoints" / file)
    loaded = load_model(None, f"torchvision:tiny?weights={name}", CPU)
    assert loaded.classes == NAMES and loaded.name == "tiny"
    for each in files:
        picture = rules.shorter_edge(Image.open(each).convert("RGB"), edge, how)
        values = rules.normalized(rules.centre(picture, (crop, crop)), MEAN, STD)
        pixels = loaded.pipeline(read_image(each, 3))
        with torch.no_grad():
            ours = loaded.model(pixels[None].float() / 255).double()
            theirs = model.double()(torch.from_numpy(values)[None])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_32"])
def test_logits_are_those_of_torchvision_itself(name, files, tmp_path):
    models = library("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    model = models.get_model(name, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    loaded = load_model(None, f"torchvision:{name}?checkpoint={tmp_path / 'own.pth'}", CPU)
    for each in files:
        inputs = weights.transforms()(Image.open(each).convert("RGB"))
        pixels = loaded.pipeline(read_image(each, 3))
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.model(pixels[None].float() / 255), model(inputs[None]), rtol=1e-4, atol=1e-4
            )


def test_a_checkpoint_of_ones_own_has_the_preset_of_the_default(torchvision, tmp_path):
    model = Tiny(5)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    spec = f"torchvision:tiny?num_classes=5&checkpoint={tmp_path / 'own.pth'}"
    loaded = load_model(None, spec, CPU)
    assert torch.equal(loaded.model.model.head.weight, model.head.weight)
    assert loaded.classes is None and loaded.pipeline.size == (24, 24)
    assert "Tiny_Weights.V2" in loaded.preprocessing

    torch.save(Tiny(3).state_dict(), tmp_path / "three.pth")
    spec = f"torchvision:tiny?weights=Tiny_Weights.V1&checkpoint={tmp_path / 'three.pth'}"
    of_three = load_model(None, spec, CPU)
    assert of_three.classes == NAMES and of_three.pipeline.size == (28, 28)


def test_without_weights_they_are_called_random(torchvision):
    assert load_model(None, "torchvision:tiny", CPU).name == "tiny (random weights)"


WRONG = {
    "unknown": ("torchvision:tinny", "must name a model of torchvision, got 'tinny'; close: tiny"),
    "weights": ("torchvision:tiny?weights=V9", "are one of V1, V2, DEFAULT, got 'V9'"),
    "argument": ("torchvision:tiny?wings=2", "cannot be made: TypeError"),
    "file": ("torchvision:tiny?weights=V1", "get it from https://example.org/models/tiny-0a1b.pth"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, torchvision):
    spec, message = WRONG[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(None, spec, CPU)


def test_nothing_is_downloaded(torchvision, tmp_path, monkeypatch):
    """Also where torchvision looks for another file than its weights name."""
    monkeypatch.setattr(
        "ironmoe.bench.models.kinds.torchvision_models._check_file", lambda *_: None
    )
    with pytest.raises(CheckpointError, match=r"needs the file .*tiny-0a1b\.pth.*downloaded"):
        load_model(None, "torchvision:tiny?weights=V1", CPU)
