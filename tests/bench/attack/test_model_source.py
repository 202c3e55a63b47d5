"""``ironmoe attack --model``: models that were made elsewhere."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app
from ironmoe.bench.data.in_memory import load_data
from ironmoe.bench.models.class_matching import match_data
from ironmoe.bench.models.load import load_model

GOLDEN = Path(__file__).parents[2] / "data" / "vmoe_tiny"
CPU = torch.device("cpu")
FEW = [
    "--steps",
    "2",
    "--attack-images",
    "20",
    "--eps",
    "4",
    "--restarts",
    "1",
    "--device",
    "cpu",
    "--all",
]


@pytest.fixture
def photos(tmp_path):
    """40 random RGB images of 16 × 16, ten classes."""
    generator = np.random.default_rng(0)
    file = tmp_path / "photos.npz"
    np.savez(
        file, images=generator.random((40, 3, 16, 16), dtype=np.float32), labels=np.arange(40) % 10
    )
    return str(file)


def attack(*arguments, code=0):
    result = CliRunner().invoke(app, ["attack", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_official_checkpoint_with_and_without_capacity(photos, tmp_path):
    pytest.importorskip("msgpack")
    for i, query in enumerate(
        ("?top_k=2", "?top_k=2&capacity=1.05&images_per_group=4&priority=1&dispatch=bfloat16")
    ):
        attack(
            "--model", f"vmoe:{GOLDEN}{query}", "--data", photos, *FEW, "--out", tmp_path / str(i)
        )
        report = json.loads((tmp_path / str(i) / "report.json").read_text())
        assert (
            report["title"].startswith('Model "V-MoE vmoe_tiny"')
            and report["report"]["worst_case"]["total"] == 20
        )
        assert list(report["routing"][0]["layers"])
        assert (tmp_path / str(i) / "report.html").exists()


def test_official_checkpoint_takes_pixels_in_minus_one_to_one(photos):
    pytest.importorskip("msgpack")
    golden = np.load(f"{GOLDEN}.npz")
    query = "?top_k=2&capacity=1.05&images_per_group=4"
    loaded = load_model(None, f"vmoe:{GOLDEN}{query}", CPU, image_size=(16, 16))
    images = (torch.from_numpy(golden["x"]).permute(0, 3, 1, 2) + 1) / 2
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(images), torch.from_numpy(golden["vanilla/aux0/logits"]), rtol=0, atol=2e-5
        )


def test_hugging_face_classifier(photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
        num_labels=12, id2label={i: f"thing {i}" for i in range(12)},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    settings = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    data = load_data(photos)
    data.classes = [f"Thing {11 - i}" for i in range(10)]
    loaded = load_model(None, f"hf:{tmp_path / 'vit'}", CPU, image_size=(16, 16))
    data.named = True
    matched, note = match_data(loaded, data)
    assert note == ""
    assert torch.equal(matched.labels, 11 - data.labels)
    assert matched.classes[matched.labels[3]] == f"thing {11 - data.labels[3]}"
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(data.images[:4]), model((data.images[:4] - mean) / std).logits
        )
    output = attack(
        "--model",
        f"hf:{tmp_path / 'vit'}",
        "--data",
        photos,
        *FEW,
        "--out",
        tmp_path / "out",
    )
    assert "images/s" in output or "clean accuracy" in output  # labels are indices of logits


def test_a_function_of_ones_own(photos, tmp_path, monkeypatch):
    (tmp_path / "my_own_models.py").write_text(
        "import torch\n"
        "def good():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, "
        "10))\n"
        "def nothing():\n    return None\n"
        "def narrow():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, "
        "10))\n"
        "def images():\n    return torch.nn.Identity()\n"
        "def needs(a):\n    return a\n"
        "def raises():\n    return {}['weights']\n"
        "class Late(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)) if len(x) == 1 else 1 / 0\n"
        "def late():\n    return Late(768, 10)\n"
        "class Never(torch.nn.Module):\n    def forward(self, x):\n        raise KeyError('key')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_models", raising=False)
    torch.manual_seed(1)
    attack("--model", "my_own_models:good", "--data", photos, *FEW, "--out", "out")
    assert (tmp_path / "out" / "report.json").exists()
    torch.manual_seed(2)  # another model under the same name: not the run that is there
    assert "other settings (weights" in attack(
        "--model", "my_own_models:good", "--data", photos, *FEW, "--out", "out", code=2
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    note = (
        "Attacking 20 of 40 images (drawn by random numbers that never change; --attack-images for "
        "more)."
    )
    assert report["notes"] == [note] and note in (tmp_path / "out" / "report.html").read_text()
    for function, message in {
        "nothing": r"must be, or return, a torch.nn.Module .* got NoneType",
        "narrow": r"narrow cannot take images of shape \(3, 16, 16\)",
        "images": r"must return logits \(images, classes\), got shape",
        "absent": "cannot be found",
        "needs": r"must be a torch.nn.Module, which takes the images, or a function without "
        r"arguments that returns one, and calling it failed: TypeError: needs\(\) "
        r"missing 1 .*argument: 'a'$",
        "raises": r"and calling it failed: KeyError: 'weights' \(my_own_models.py, line 13\)",
        "Never": r"Never cannot take images .* KeyError: 'key' \(my_own_models.py, line 21\)",
        "late": r"--model my_own_models:late failed under attack: ZeroDivisionError: division by "
        r"zero \(my_own_models.py, line 16\)",
    }.items():
        output = attack(
            "--model",
            f"my_own_models:{function}",
            "--data",
            photos,
            *FEW,
            "--out",
            f"no-{function}",
            code=2,
        )
        assert re.search(message, output), output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one model"),
        (
            ["some.safetensors", "--model", "hf:x"],
            "not both: got the checkpoint some.safetensors and --model hf:x",
        ),
        (["--model", "resnet50"], "--model must be timm:NAME"),
        (["--model", "no_such_package.here:make"], "No module named 'no_such_package'"),
        (["--model", "hf:no/such/folder"], "must name a folder of save_pretrained"),
        (["--model", "vmoe:no/such/prefix?top_k=2"], "no/such/prefix"),
        (["--model", f"vmoe:{GOLDEN}"], "top_k must be given for a checkpoint with 8 experts"),
        (["--model", f"vmoe:{GOLDEN}?wings=2"], "may set top_k, capacity"),
        (["--model", f"vmoe:{GOLDEN}?top_k=two"], "got top_k='two'"),
        (["--model", f"vmoe:{GOLDEN}?top_k=9"], "top_k must be from 1 to num_experts = 8, got 9"),
        (["--model", f"vmoe:{GOLDEN}?top_k=2&dispatch=int8"], "dispatch=bfloat16 only"),
    ],
)
def test_what_is_wrong_is_named(arguments, message, photos, tmp_path):
    pytest.importorskip("msgpack")
    assert message in attack(*arguments, "--data", photos, *FEW, "--out", tmp_path / "no", code=2)
