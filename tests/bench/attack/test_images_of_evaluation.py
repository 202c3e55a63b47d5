"""``ironmoe attack`` on files: which images it takes, as which pixels, in which classes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ironmoe.attacks.data.imagenet import imagenet_classes
from ironmoe.bench.cli.app import app

MODELS = """
import torch

class Small(torch.nn.Module):
    def __init__(self, classes=3, size=4):
        super().__init__()
        torch.manual_seed(0)
        self.pool = torch.nn.AdaptiveAvgPool2d(size)
        self.head = torch.nn.Linear(3 * size * size, classes)

    def forward(self, x):
        return self.head(self.pool(x).flatten(1))

def small(classes=3):
    return Small(classes)

class Nothing(torch.nn.Module):
    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)

def without_parameters():
    return Nothing()

def grouped():
    from ironmoe.moe import Capacity, VMoE
    torch.manual_seed(0)
    return VMoE(8, 4, 16, 2, 2, 16, 3, num_experts=2, top_k=1, moe_layers="last 1",
                capacity=Capacity(1.0, images_per_group=2)).eval()

def stream():
    from ironmoe.attacks.data import ImageStream, Preprocessing, image_folder
    return ImageStream(image_folder("photos"), Preprocessing(resize=(9, 9), mode="exact"),
                       skip_bad=True)

def other_each_time():
    class Sampler(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(torch.randperm(20).tolist())
        def __len__(self):
            return 20
    return torch.utils.data.DataLoader(data().dataset, batch_size=6, sampler=Sampler())

def data():
    from torch.utils.data import DataLoader, TensorDataset
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(20) % 3), batch_size=6)
"""
USUAL = ("--attack", "pgd", "--steps", 2, "--restarts", 1, "--eps", 2, "--no-checks", "--all",
         "--device", "cpu", "--model", "models_18:small")  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models, and ``photos``: three classes of four pictures each."""
    (tmp_path / "models_18.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_18", raising=False)
    random = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")
    return tmp_path


def attack(*arguments, ok=True, data="photos", usual=USUAL):
    options = ["attack", *usual, "--data", data, *arguments]
    result = CliRunner().invoke(app, [*map(str, options)], env={"COLUMNS": "200"})
    expected = 0 if ok else 2
    assert result.exit_code == expected, result.output + repr(result.exception)
    return " ".join(result.output.split())


def report(folder="run"):
    return json.loads((Path(folder) / "report.json").read_text())


def test_pixels_are_those_that_the_user_asks_for_and_may_be_no_square(place):
    attack("--resize", "18x26", "--crop", "16x24", "--interpolation", "bicubic", "--out", "run")
    found = report()
    assert found["pixels"].startswith("stretched to 18 × 26 (bicubic), centre 16 × 24")
    assert found["settings"]["preprocessing"]["crop"] == [16, 24]
    assert found["report"]["clean"]["total"] == 12
    attack("--save-images", "npz", "--crop", "16x24", "--resize", "18", "--out", "other")
    with np.load("other/adversarial/pgd.npz") as file:
        assert not len(file["labels"]) or file["images"].shape[1:] == (3, 16, 24)


def test_classes_without_names_are_a_guess_and_a_map_is_none(place):
    said = attack("--out", "guess")
    assert "matched by number, which is a guess: logit 0 is 'a'" in said
    assert any("which is a guess" in note for note in report("guess")["notes"])
    (place / "map.json").write_text('{"a": 2, "b": 1, "c": 0}')
    assert "guess" not in attack("--class-map", "map.json", "--out", "map")
    labels = [
        [json.loads(line)["label"] for line in Path(run, "images.jsonl").read_text().splitlines()]
        for run in ("guess", "map")
    ]
    assert labels[1] == [2 - label for label in labels[0]]


def test_a_part_of_imagenet_is_enough(place):
    for name, wnid in zip("abc", ("n01440764", "n02123045", "n15075141"), strict=True):
        (place / "photos" / name).rename(place / "photos" / wnid)
    model = ("--model", "models_18:small?classes=1000")
    usual = (*USUAL[:-2], *model)
    said = attack("--out", "run", usual=usual)
    assert "the standard order of ImageNet's, which is a guess" in said
    lines = Path("run/images.jsonl").read_text().splitlines()
    assert {json.loads(line)["label"] for line in lines} == {0, 281, 999}
    assert imagenet_classes()[281].synonyms[0] == "tabby"
    assert "which gives no names of them, got 3, of which 3 cannot be matched" in attack(
        "--out", "no", usual=(*USUAL[:-2], "--model", "models_18:small?classes=999"), ok=False
    )


def test_labels_that_are_no_logits_are_named(place):
    table = "".join(f"{name}/{number}.jpg,{number}\n" for name in "abc" for number in range(4))
    (place / "labels.csv").write_text(table)
    said = attack("--labels", "labels.csv", "--out", "run", ok=False)
    assert "indices of the 3 logits of small, 0 … 2, got 0 … 3; give --class-map FILE" in said


def test_an_image_that_cannot_be_read_is_named_or_left_out(place):
    bad = place / "photos" / "b" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    said = attack("--out", "stops", ok=False)
    assert "b/2.jpg cannot be read" in said and "--skip-bad passes over such files" in said

    said = attack("--skip-bad", "--out", "run")
    assert "1 image is left out, as neither robust nor fallen: image photos/b/2.jpg" in said
    found = report()
    assert found["report"]["skipped"] == [6] and list(found["unread"]) == ["6"]
    assert found["report"]["clean"]["total"] == 11
    rows = [json.loads(line) for line in Path("run/images.jsonl").read_text().splitlines()]
    assert rows[6]["image"] == "b/2.jpg" and rows[6]["row"] == 6
    assert rows[6]["label"] == 1 and not rows[6]["fell"]  # its class is known


def test_images_beside_one_that_cannot_be_read_are_left_out_where_they_influence_each_other(place):
    bad = place / "photos" / "b" / "2.jpg"
    bad.write_bytes(b"")
    usual = (*USUAL[:-2], "--model", "models_18:grouped")
    said = attack("--image-size", 8, "--skip-bad", "--batch-size", 4, "--out", "run", usual=usual)
    assert report()["report"]["skipped"] == [6, 7]
    assert "or an image of their group cannot be read (in the data number 7)" in said


def test_a_loader_of_ones_own_is_taken_as_it_comes(place):
    attack("--attack-images", 15, "--out", "run", data="models_18:data")
    found = report()
    assert found["images"] == {
        "asked": 15,
        "reached": 15,
        "counted": 15,
        "told": "15 images",
    }
    assert found["notes"] == [
        "Images of a loader are taken as they come.",
        "Attacking the first 15 of 20 images (--attack-images for more).",
    ]
    assert (place / "run" / "hardest.png").exists() or (place / "run" / "easiest.png").exists()
    said = attack("--workers", 2, "--out", "no", data="models_18:data", ok=False)
    assert "--workers is for sets of images" in said
    usual = [option for option in USUAL if option != "--all"]
    assert "use --all" in attack("--out", "no", data="models_18:data", usual=usual, ok=False)


def test_a_loader_that_shuffles_by_itself_is_refused(place):
    said = attack("--out", "run", data="models_18:other_each_time", ok=False)
    assert "the same images in the same order each time, got two different batches 0" in said


def test_a_stream_of_ones_own_keeps_its_pixels_and_says_what_it_could_not_read(place):
    (place / "photos" / "b" / "2.jpg").write_bytes(b"no image")
    said = attack("--out", "run", data="models_18:stream")
    found = report()
    assert found["pixels"] == "stretched to 9 × 9 (bilinear)"
    assert found["report"]["skipped"] == [6] and "photos/b/2.jpg" in said
    assert "7 of 12 images (drawn" in attack(
        "--attack-images", 7, "--out", "few", data="models_18:stream"
    )


def test_floats_are_taken_as_they_are_and_the_command_says_so(place):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained("net")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (place / "net" / "preprocessor_config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(0)
    floats, labels = random.random((9, 3, 24, 24), np.float32), np.arange(9) % 3
    np.savez("floats.npz", images=floats, labels=labels)
    np.savez("bytes.npz", images=(255 * floats).astype(np.uint8), labels=labels)
    usual = (*USUAL[:-2], "--model", "hf:net")
    attack("--out", "floats", data="floats.npz", usual=usual)
    attack("--out", "bytes", data="bytes.npz", usual=usual)
    assert report("floats")["pixels"].startswith("as they are (floats are not resized; pictures")
    assert report("floats")["settings"]["preprocessing"]["resize"] is None
    assert report("bytes")["pixels"].startswith("stretched to 16 × 16")
    said = attack("--resize", "18", "--out", "no", data="floats.npz", usual=usual, ok=False)
    assert "since floats are not resized, got 24 × 24" in said


def test_a_model_without_parameters_is_attacked(place):
    (place / "photos" / "c").rename(place / "c")
    usual = (*USUAL[:-2], "--model", "models_18:without_parameters")
    attack("--image-size", 8, "--out", "run", usual=usual)
    assert report()["report"]["clean"]["total"] == 8


def test_an_image_size_that_the_model_does_not_take_is_refused(place):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, num_labels=3, id2label=dict(enumerate("abc")),
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (place / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    usual = (*USUAL[:-2], "--model", "hf:vit")
    said = attack("--image-size", 20, "--out", "run", usual=usual, ok=False)
    assert "--image-size 20 is not what ViTForImageClassification takes: stretched to 16" in said
    assert "guess" not in attack("--out", "run", usual=usual)


def test_other_files_are_another_run(place):
    attack("--out", "run")
    file = place / "photos" / "a" / "0.jpg"
    Image.new("RGB", (9, 9)).save(file)
    assert "other settings (checksum" in attack("--out", "run", ok=False)


def test_a_killed_run_on_files_goes_on_to_the_same_end(place):
    options = (*USUAL[4:], "--attack", "square", "--data", "photos", "--workers", 1)
    slow = ["attack", *map(str, options), "--queries", "40", "--batch-size", "2", "--out", "killed"]
    command = [sys.executable, "-m", "ironmoe.bench", *slow]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = place / "killed" / "results" / "journal" / "journal-0.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if journal.exists() and journal.read_bytes().count(b"\n") > 1:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    known = journal.read_bytes()

    again = CliRunner().invoke(app, slow)
    assert again.exit_code == 0, again.output
    assert journal.read_bytes().startswith(known[: known.rfind(b"\n") + 1])
    fresh = [*slow[:-1], "fresh"]
    assert CliRunner().invoke(app, fresh).exit_code == 0
    assert found_of(place / "killed") == found_of(place / "fresh")


def found_of(folder):
    """What was found of each image, without what it cost: a kill takes the passes under way."""
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    cost = ("forwards", "backwards")
    return [{key: value for key, value in row.items() if key not in cost} for row in rows]


def test_final_images_that_take_too_much_are_not_kept_and_the_report_says_so(place, monkeypatch):
    monkeypatch.setattr("ironmoe.bench.attack.run.KEPT_BYTES", 1000)
    said = attack("--image-size", 8, "--out", "run")
    assert "are not kept, so none are shown" in said
    assert not (place / "run" / "hardest.png").exists()


def test_weights_of_bfloat16_are_attacked(place):
    (place / "half_18.py").write_text(
        "import torch\nfrom models_18 import small as whole\n"
        "def small():\n    return whole().to(torch.bfloat16)\n"
    )
    usual = (*USUAL[:-2], "--model", "half_18:small")
    attack("--image-size", 8, "--out", "run", usual=usual)
    assert report()["report"]["clean"]["total"] == 12
    assert torch.get_default_dtype() == torch.float32


def test_runs_of_models_that_see_other_pixels_of_the_same_files_can_be_compared(place):
    attack("--image-size", 16, "--out", "one")
    attack("--resize", 20, "--crop", "20", "--out", "other")
    result = CliRunner().invoke(app, ["compare", "one", "other"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "On 12 images." in said and "pixels: centre square to 16 × 16" in said

    (place / "map.json").write_text('{"a": 2, "b": 1, "c": 0}')  # another order of the classes
    attack("--image-size", 16, "--class-map", "map.json", "--out", "turned")
    result = CliRunner().invoke(app, ["compare", "one", "turned"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output

    Image.new("RGB", (9, 9)).save(place / "photos" / "a" / "0.jpg")
    attack("--resize", 20, "--crop", "20", "--out", "changed")
    result = CliRunner().invoke(app, ["compare", "one", "changed"], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "about the same images" in " ".join(result.output.split())
