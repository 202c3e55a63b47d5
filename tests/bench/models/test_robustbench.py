"""``robustbench:NAME``: files of its zoo on disk, and the preprocessing of its benchmark."""

import re
from enum import Enum
from types import SimpleNamespace

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


class Interpolation(Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Resize:
    def __init__(self, size, interpolation=Interpolation.BILINEAR):
        self.size, self.interpolation, self.max_size = size, interpolation, None


class CenterCrop:
    def __init__(self, size):
        self.size = (size, size)


class ToTensor:
    pass


class Rotation:
    def __repr__(self):
        return "Rotation(90)"


PREPROCESSINGS = {
    "Res40Crop32": [Resize(40), CenterCrop(32), ToTensor()],
    "BicubicRes40Crop32": [Resize(40, Interpolation.BICUBIC), CenterCrop(32), ToTensor()],
    "Res32": [Resize([32, 32]), ToTensor()],
    "Crop48": [CenterCrop(48), ToTensor()],
    "Odd": [Rotation(), ToTensor()],
    None: [ToTensor()],
}


class Dataset(Enum):
    cifar_10 = "cifar10"
    imagenet = "imagenet"


class Threat(Enum):
    Linf = "Linf"
    L2 = "L2"


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    """A small robustbench, whose models are named after their preprocessing."""
    names = [name for name in PREPROCESSINGS if name]
    entries = {f"A2026_{name}": {"gdrive_id": "1a", "preprocessing": name} for name in names}
    entries["B2026Deck"] = {"gdrive_id": ["1b", "1c"], "preprocessing": None}
    entries["C2026Timm"] = {"gdrive_id": None, "preprocessing": None}

    def download(gdrive_id, fname_save):
        raise AssertionError("this would be a download")

    def load(name, model_dir, dataset, threat_model):
        if name == "C2026Timm":
            torch.hub.load_state_dict_from_url("https://example.org/c2026.pth", str(tmp_path))
        model = tiny()
        model.load_state_dict(torch.load(f"{model_dir}/{dataset}/{threat_model}/{name}.pt"))
        return model

    def get_preprocessing(dataset, threat, name, preprocessing):
        key = entries[name]["preprocessing"]
        return SimpleNamespace(transforms=PREPROCESSINGS[key])

    dicts = {data: dict.fromkeys(Threat, entries) for data in Dataset}
    stand_in(monkeypatch, "robustbench")
    stand_in(monkeypatch, "robustbench.utils", load_model=load, download_gdrive_new=download)
    stand_in(monkeypatch, "robustbench.data", get_preprocessing=get_preprocessing)
    stand_in(monkeypatch, "robustbench.model_zoo", model_dicts=dicts)
    stand_in(
        monkeypatch, "robustbench.model_zoo.enums", BenchmarkDataset=Dataset, ThreatModel=Threat
    )
    folder = tmp_path / "imagenet" / "Linf"
    folder.mkdir(parents=True)
    for name in names:
        torch.save(tiny().state_dict(), folder / f"A2026_{name}.pt")
    return tmp_path


def twin(picture, name):
    """The preprocessing by name, as RobustBench documents it."""
    if "Res40" in name:
        picture = rules.shorter_edge(picture, 40, "bicubic" if "Bic" in name else "bilinear")
    if name == "Res32":
        picture = rules.exact(picture, (32, 32), "bilinear")
    crop = 48 if name == "Crop48" else 32
    return rules.normalized(rules.centre(picture, (crop, crop)), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("name", ["Res40Crop32", "BicubicRes40Crop32", "Res32", "Crop48"])
def test_logits_are_those_of_its_benchmark(name, zoo, tmp_path):
    spec = f"robustbench:A2026_{name}?dataset=imagenet&model_dir={zoo}"
    loaded = load_model(None, spec, CPU)
    assert "RobustBench" in loaded.preprocessing
    for file in write_jpegs(tmp_path):
        pixels = loaded.pipeline(read_image(file, 3))
        values = torch.from_numpy(twin(Image.open(file).convert("RGB"), name))
        assert torch.equal(pixels.double() / 255, values)
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.model(pixels[None].float() / 255), tiny()(values[None].float())
            )


def test_the_preprocessings_of_robustbench_itself_can_be_read():
    data = library("robustbench.data")
    from ironmoe.bench.models.kinds.torchvision_rules import rules_of

    for name, compose in data.PREPROCESSINGS.items():
        assert rules_of(compose.transforms, "model", str(name)).source == str(name)


WRONG = {
    "file": (
        "A2026_Res32?dataset=cifar10&model_dir=nowhere",
        "nowhere/cifar10/Linf/A2026_Res32.pt, which does not exist, and nothing is downloaded; get "
        "it from https://drive.google.com/uc?id=1a",
    ),
    "files": ("B2026Deck", "models/cifar10/Linf/B2026Deck_m0.pt, which does not exist"),
    "fetched by timm": ("C2026Timm", "get it from https://example.org/c2026.pth"),
    "unknown": ("A2026_Res33", "got 'A2026_Res33'; close: A2026_Res32"),
    "threat": ("A2026_Res32?threat_model=L7", "of threat_model Linf, L2, got cifar10 and L7"),
    "data": ("A2026_Res32?dataset=svhn", "of dataset cifar10, imagenet"),
    "key": ("A2026_Res32?wings=2", "may set dataset, threat_model, model_dir, got wings='2'"),
    "transform": ("A2026_Odd?dataset=imagenet&model_dir={zoo}", "got Rotation(90)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, zoo, monkeypatch):
    spec, message = WRONG[case]
    monkeypatch.chdir(zoo)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(None, f"robustbench:{spec.format(zoo=zoo)}", CPU)
    assert not (zoo / "nowhere").exists()
