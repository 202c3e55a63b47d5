"""What ``ironmoe attack`` writes beside its report: rows, tables, adversarial images."""

import csv
import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ironmoe.attacks import Flag, read_rows
from ironmoe.bench.attack import run as attack_run
from ironmoe.bench.attack.saved import found_images
from ironmoe.bench.attack.saved.found_images import SaveError, check_form
from ironmoe.bench.attack.saved.npz import write_npz
from ironmoe.bench.attack.saved.png import from_png, png
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.files import write_atomically
from ironmoe.bench.data.in_memory import load_data

SMALL = ["--all", "--attack-images", 36, "--device", "cpu", "--steps", 4, "--no-checks"]
EPS = ["--eps", "2,8,32"]


def attack(*arguments, code=0):
    return attack_model("linear", "set.npz", *SMALL, *arguments, code=code)


def attack_model(model, data, *arguments, code=0):
    common = ["--model", f"small_models:{model}", "--data", data]
    command = ["attack", *map(str, [*common, *arguments])]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def index_of(folder):
    with (folder / "adversarial" / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """Of the files that other programs read, by name."""
    files = [
        *folder.glob("images.*"),
        *folder.glob("table.*"),
        *(folder / "adversarial").rglob("*.*"),
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def predicted(place, images):
    from small_models import linear

    with torch.no_grad():
        return linear()(images).argmax(1)


def test_the_rows_and_tables_of_a_run_are_those_of_its_report(place, no_pictures):
    output = attack("--attack", "pgd,fgsm", *EPS, "--out", "run")
    assert "Image by image: run/images.csv, table: run/table.tex" in output
    report = json.loads((place / "run" / "report.json").read_text())
    rows = read_rows("run/images.csv")
    assert rows == read_rows("run/images.jsonl") and len(rows) == 2 * 36
    with np.load("run/images.npz") as verdicts:
        for name in ("pgd", "fgsm"):
            mine = [row for row in rows if row["attack"] == name]
            for column in mine[0].keys() - {"attack"}:
                key = column if column in verdicts else f"{name}/{column}"
                for row, value in zip(mine, verdicts[key].tolist(), strict=True):
                    missing = value != value or value in (-1, "", [])
                    assert missing if row[column] is None else row[column] == value, column
            assert {*verdicts["index"]} == {*verdicts["number"]}  # the name of earlier versions

    page = (Path(__file__).parents[3] / "docs" / "results.md").read_text()
    with np.load("run/images.npz") as arrays:
        names = [name.replace("pgd/", "ATTACK/").replace("fgsm/", "ATTACK/") for name in arrays]
    summary, flag = report["report"]["attacks"]["pgd"], Flag("a", True, 1.0, "b").as_dict()
    for part in (report, report["report"], summary, flag, report["worst_case"][0], names):
        assert [key for key in part if f"`{key}`" not in page] == []

    table = list(csv.DictReader((place / "run" / "table.csv").open(newline="")))
    worst = [int(row["right"]) for row in table if row["attack"] == "worst case"]
    assert worst == [share["count"] for share in report["worst_case"]]
    latex = (place / "run" / "table.tex").read_text()
    assert "linear & set & Linf & pgd & 36 & 83.3 [" in latex
    assert "$\\varepsilon = 2/255$" in latex


def test_found_images_are_saved_and_are_the_same_successes(place, no_pictures):
    output = attack("--attack", "pgd,fgsm", *EPS, "--out", "run", "--save-images", "NPZ")
    index = index_of(place / "run")
    fell = [row for row in read_rows("run/images.csv") if row["fell"]]
    assert f"Adversarial images: {len(fell)}, listed in run/adversarial/index.csv" in output
    assert [(row["attack"], int(row["number"])) for row in index] == [
        (row["attack"], row["number"]) for row in fell
    ]
    clean = load_data("set.npz").images
    for name in ("pgd", "fgsm"):
        with np.load(f"run/adversarial/{name}.npz") as file:
            images, saved = torch.from_numpy(file["images"]), dict(file)
        mine = [row for row in index if row["attack"] == name]
        assert [row["file"] for row in mine] == [f"{name}.npz"] * len(images)
        assert [int(row["place"]) for row in mine] == list(range(len(images)))
        assert saved["prediction"].tolist() == predicted(place, images).tolist()
        assert (saved["prediction"] != saved["labels"]).all()
        distance = (images - clean[saved["row"]]).double().abs().flatten(1).amax(1)
        assert (distance.numpy() <= saved["eps"] + 1e-12).all()
        assert np.allclose(distance.numpy(), saved["distance"], atol=1e-9)


def as_savez_has_it(columns, images):
    """The bytes of the file that numpy writes of all images at once."""
    file = io.BytesIO()
    np.savez(file, **columns, images=np.stack(images) if images else np.zeros(0, np.float32))
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_npz_that_is_written_image_by_image_is_that_of_numpy(tmp_path, dtype, count):
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 4, 5, generator=random, dtype=dtype) for _ in range(count)]
    images = [image.transpose(1, 2) for image in images]  # not contiguous
    columns = {"row": np.arange(count), "prediction": np.ones(count), "labels": np.zeros(count)}
    write_npz(tmp_path / "a.npz", columns, iter(images), count)
    assert (tmp_path / "a.npz").read_bytes() == as_savez_has_it(columns, images)
    with np.load(tmp_path / "a.npz") as file:
        assert list(file) == ["row", "prediction", "labels", "images"]
        assert len(file["images"]) == count and file["labels"].tolist() == [0] * count
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_the_memory_that_an_npz_takes_does_not_grow_with_its_images(tmp_path):
    size, count = 3 * 64 * 64 * 4, 60
    images = (
        torch.from_numpy(np.full((3, 64, 64), place, dtype=np.float32)) for place in range(count)
    )
    tracemalloc.start()
    try:
        write_npz(tmp_path / "a.npz", {"row": np.arange(count)}, images, count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * size < count * size  # copies and buffers of few images, and not all of them
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"][:, 0, 0, 0].tolist() == list(range(count))


def test_an_npz_that_is_interrupted_leaves_the_old_one(tmp_path):
    def stops(count):
        yield from torch.rand(count, 3, 4, 4)
        raise KeyboardInterrupt

    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_npz(path, {"row": np.arange(5)}, stops(2), 5)
    with pytest.raises(ValueError, match="images must be as many as rows, 5, got 2"):
        write_npz(path, {"row": np.arange(5)}, iter(torch.rand(2, 3, 4, 4)), 5)
    mixed = [torch.rand(3, 4, 4), torch.rand(3, 4, 5)]
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\) and dtype float32, got \(3, 4, 5\)"):
        write_npz(path, {}, iter(mixed), 2)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_images_of_a_finished_run_are_saved_without_attacking_anew(place, no_pictures):
    attack(*EPS, "--out", "whole", "--save-images", "npz")
    attack(*EPS, "--out", "parts", "--max-forwards", 200)
    report = json.loads((place / "parts" / "report.json").read_text())
    assert not report["report"]["complete"] and not (place / "parts" / "adversarial").exists()
    attack(*EPS, "--out", "parts", "--max-forwards", 150, "--save-images", "npz")
    first = index_of(place / "parts")
    attack(*EPS, "--out", "parts")
    output = attack(*EPS, "--out", "parts", "--save-images", "npz")
    assert "Going on in parts/" in output
    numbers = {row["number"] for row in index_of(place / "parts")}
    assert first and {row["number"] for row in first} < numbers

    whole, parts = contents(place / "whole"), contents(place / "parts")
    assert whole.keys() == parts.keys()
    same = [name for name in whole if not name.startswith("images.")]
    assert all(whole[name] == parts[name] for name in same)


def test_where_nothing_falls_the_index_is_empty(place, no_pictures):
    output = attack("--eps", "0", "--out", "run", "--save-images", "npz")
    assert "Adversarial images: 0" in output
    assert index_of(place / "run") == []
    header = (place / "run" / "adversarial" / "index.csv").read_text()
    assert header == "number,row,label,prediction,distance,attack,eps,file,place\n"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_is_the_image_bit_by_bit(channels):
    steps = torch.randint(0, 256, (channels, 9, 7))
    steps[0, 0, :2] = torch.tensor([0, 255])
    image = steps.float() / 255
    assert torch.equal(from_png(png(image)), image)
    assert png(image)[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_one_of_256_levels_comes_back():
    image = (torch.arange(256).float() / 255).view(1, 16, 16)
    assert torch.equal(from_png(png(image)), image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 2, 2), 0.5), "multiples of 1/255"),
        (torch.full((1, 2, 2), 2.0), "multiples of 1/255"),
        (torch.zeros(2, 2, 2), r"\(1 or 3, H, W\) for a PNG, got \(2, 2, 2\)"),
        (torch.zeros(2, 2), r"got \(2, 2\)"),
    ],
)
def test_what_a_png_cannot_hold_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        png(image)


@pytest.mark.parametrize(
    ("form", "shape", "levels", "message"),
    [
        ("jpeg", (1, 8, 8), None, "--save-images must be png or npz, got 'jpeg'"),
        ("png", (4, 8, 8), 256, r"1 or 3 channels, got shape \(4, 8, 8\); use --save-images npz"),
        ("png", (8, 8), 256, r"got shape \(8, 8\)"),
        ("png", (3, 8, 8), None, "needs --levels 256, .* got None; or use --save-images npz"),
        ("png", (3, 8, 8), 100, "got 100; or use"),
    ],
)
def test_what_cannot_be_saved_is_said_before_the_attacks(form, shape, levels, message):
    with pytest.raises(SaveError, match=message):
        check_form(form, shape, levels)


@pytest.mark.parametrize("levels", [2, 4, 6, 16, 18, 52, 86, 256])
def test_levels_whose_steps_a_png_has_are_saved(levels):
    check_form("png", (1, 8, 8), levels)
    image = (torch.arange(levels) / (levels - 1)).view(1, 1, -1)
    assert torch.equal(from_png(png(image)), image)


RANDOM_AND_BAD = """
def flipping():
    class Flipping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = linear()

        def forward(self, images):
            signs = 1 - 2 * (torch.rand(len(images), 1) < 0.1).float()
            return signs * self.inside(images)

    return Flipping()

def broken():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = linear()

        def forward(self, images):
            logits = self.inside(images)
            bad = (images - BAD).flatten(1).abs().amax(1, keepdim=True) < 1e-3
            return logits / (~bad)

    return Broken()

import numpy
BAD = torch.from_numpy(numpy.load("set.npz")["images"][5])
"""


def test_a_random_model_is_reported_as_one(place, no_pictures):
    """90 % right at a radius of nothing, in terminal, report and tables, whatever the attack."""
    with (place / "small_models.py").open("a") as file:
        file.write(RANDOM_AND_BAD)
    options = [
        "--all",
        "--device",
        "cpu",
        "--eps",
        "0.0001,8",
        "--steps",
        5,
        "--queries",
        5,
        "--attack",
        "pgd,square",
    ]
    output = attack_model("flipping", "set.npz", *options, "--out", "run")
    assert "The model is random, so each verdict rests on 64 passes" in output
    report = json.loads((place / "run" / "report.json").read_text())
    assert report["report"]["passes"] == 64
    right = 34 / 40  # a linear model gets the others wrong
    for row in csv.DictReader((place / "run" / "table.csv").open(newline="")):
        if row["attack"] == "clean" or row["eps"] == repr(0.0001 / 255):
            expected = 0.9 * right + 0.1 * (1 - right)
            assert abs(float(row["accuracy"]) - expected) < 0.05
            assert row["passes"] == "64"
    shares = [share["value"] for share in report["worst_case"]]
    table = list(csv.DictReader((place / "run" / "table.csv").open(newline="")))
    assert shares == [float(row["accuracy"]) for row in table if row["attack"] == "worst case"]
    rows = read_rows("run/images.csv")
    assert all(len(row["right_second"]) == 3 for row in rows)


def test_images_without_finite_logits_are_named_or_skipped(place, no_pictures):
    with (place / "small_models.py").open("a") as file:
        file.write(RANDOM_AND_BAD)
    options = [
        "--all",
        "--device",
        "cpu",
        "--eps",
        "2",
        "--steps",
        2,
        "--no-checks",
        "--out",
        "run",
    ]
    output = attack_model("broken", "set.npz", *options, code=2)
    assert "5" in output
    output = attack_model("broken", "set.npz", *options, "--on-bad", "skip")
    assert "1 image skipped" in output and "(in the data number 5)" in output
    rows = read_rows("run/images.csv")
    assert [row["number"] for row in rows if row["skipped"]] == [5]
    message = "--on-bad must be raise or skip, got 'drop'"
    assert message in attack_model("broken", "set.npz", *options, "--on-bad", "drop", code=2)


def test_a_wrong_form_ends_the_command_before_it_begins(place):
    assert "--save-images must be png or npz, got 'gif'" in attack("--save-images", "gif", code=2)


def test_more_images_than_are_kept_are_not_promised(place, monkeypatch):
    monkeypatch.setattr(attack_run, "KEPT_BYTES", 1000)
    message = "needs final images of at most 1e-06 GB, got 0.0 GB; take fewer --attack-images"
    assert message in attack("--save-images", "npz", "--out", "run", code=2)
    assert not (place / "run").exists()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_saved_png_read_back_is_the_same_success(norm, place, no_pictures):
    options = ["--attack", "pgd,square", "--queries", 5, "--norm", norm, *EPS, "--out", "run"]
    output = attack(*options, "--save-images", "png")
    assert "The images were rounded to 256 levels first, by up to 0.002." in output
    index = index_of(place / "run")
    assert len(index) == sum(row["fell"] for row in read_rows("run/images.csv")) > 5
    clean = (load_data("set.npz").images * 255).round() / 255
    for row in index:
        data = (place / "run" / "adversarial" / row["file"]).read_bytes()
        with Image.open(place / "run" / "adversarial" / row["file"]) as file:
            steps = np.asarray(file)
        assert steps.dtype == np.uint8 and steps.shape == (4, 4)
        image = torch.from_numpy(steps.copy())[None].float() / 255
        assert torch.equal(image, from_png(data))

        assert int(predicted(place, image[None])) == int(row["prediction"]) != int(row["label"])
        change = (image.double() - clean[int(row["row"])].double()).flatten()
        distance = float(change.abs().max() if norm == "Linf" else change.norm())
        assert distance == pytest.approx(float(row["distance"]), abs=1e-7)
        assert float(row["distance"]) <= float(row["eps"])

    attack(*options, "--levels", 256, "--save-images", "npz")  # the same run, in another form
    for row in index_of(place / "run"):
        with np.load(place / "run" / "adversarial" / row["file"]) as file:
            image = torch.from_numpy(file["images"][int(row["place"])])
        file = place / "run" / "adversarial" / row["attack"] / f"{int(row['number']):05}.png"
        assert torch.equal(from_png(file.read_bytes()), image)


def test_a_kill_while_images_are_saved_loses_nothing(place, no_pictures, monkeypatch):
    options = [*EPS, "--save-images", "png"]
    attack(*options, "--out", "whole")
    written = []

    def killed_at_the_third(path, content):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(found_images, "write_atomically", killed_at_the_third)
        attack(*options, "--out", "killed", code=130)
    assert not (place / "killed" / "adversarial" / "index.csv").exists()
    attack(*options, "--out", "killed")
    whole, killed = contents(place / "whole"), contents(place / "killed")
    same = [name for name in whole if name != "images.npz"]
    assert whole.keys() == killed.keys() and all(whole[name] == killed[name] for name in same)


def test_fewer_levels_are_attacked_and_saved(place, no_pictures):
    attack(*EPS, "--levels", 16, "--save-images", "png", "--out", "run")
    index = index_of(place / "run")
    assert index
    for row in index:
        image = from_png((place / "run" / "adversarial" / row["file"]).read_bytes())
        assert torch.equal((image * 15).round() / 15, image)
        assert int(predicted(place, image[None])) == int(row["prediction"])


def test_images_of_8_bits_are_not_rounded(place, no_pictures):
    with np.load("set.npz") as file:
        np.savez("bytes.npz", images=(255 * file["images"]).astype(np.uint8), labels=file["labels"])
    output = attack_model("linear", "bytes.npz", *SMALL, "--levels", 256, "--out", "run")
    assert "rounded" not in output


def test_levels_are_a_setting_of_the_run(place, no_pictures):
    attack("--eps", "8", "--levels", 256, "--out", "run")
    settings = json.loads((place / "run" / "settings.json").read_text())
    assert settings["attacks"]["levels"] == 256
    assert "attacks.levels" in attack("--eps", "8", "--out", "run", code=2)
    attack("--eps", "8", "--out", "plain")
    assert "levels" not in json.loads((place / "plain" / "settings.json").read_text())["attacks"]
    assert "'--levels': must be at least 2, got 1" in attack("--levels", 1, code=2)
