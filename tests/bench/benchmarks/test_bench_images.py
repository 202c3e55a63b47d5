"""``ironmoe bench images``: what it writes is what it measured, and the loaders give one thing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ironmoe.bench.benchmarks.images import attacking, vit_s
from ironmoe.bench.benchmarks.images.expected import (
    START_SECONDS,
    attack_seconds,
    loading_seconds,
)
from ironmoe.bench.benchmarks.images.jpegs import LONGEST, SHORTEST, make_jpegs
from ironmoe.bench.benchmarks.images.loading import PlainImages, loaded
from ironmoe.bench.benchmarks.images.memory import in_a_process
from ironmoe.bench.cli.app import app


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from rich.console import Console

    made = make_jpegs(tmp_path_factory.mktemp("jpegs"), 6, Console(quiet=True))
    return [str(file) for file in made]


def test_an_image_depends_on_its_number_alone_and_has_edges_of_224_and_more(files, tmp_path):
    from rich.console import Console

    few = make_jpegs(tmp_path, 2, Console(quiet=True))
    assert [file.read_bytes() for file in few] == [Path(file).read_bytes() for file in files[:2]]
    sizes = [Image.open(file).size for file in files]
    assert all(SHORTEST <= edge <= LONGEST for size in sizes for edge in size)
    assert len(set(sizes)) > 1


def test_both_loaders_give_the_same_pixels_and_all_images_are_counted(files):
    rows = {loader: loaded(loader, files, 0) for loader in ("plain", "stream")}
    assert rows["plain"]["checksum"] == rows["stream"]["checksum"] != 0
    assert all(row["images_per_second"] > 0 for row in rows.values())
    image, _ = PlainImages(files)[3]
    assert image.shape == (3, 224, 224) and image.dtype == torch.float32
    assert np.isfinite(image.numpy()).all() and image.min() < 0 < image.max()


def test_a_row_says_what_memory_its_process_took():
    row = in_a_process(take, 60)
    assert row["did"] == 60 and row["peak_mb"] > 60


def take(megabytes):
    """A row of a process that took so much."""
    return {"did": len(bytes(megabytes * 10**6)) // 10**6}


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "image_size": 224, "patch_size": 56}  # fmt: skip


def test_the_command_keeps_each_row_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(vit_s, "SIZES", SMALL)
    process = "ironmoe.bench.benchmarks.images.run.in_a_process"
    peaks = {"peak_mb": 1.0, "worker_peak_mb": 2.0}
    monkeypatch.setattr(process, lambda work, *given: work(*given) | peaks)
    options = ["bench", "images", "--parts", "attack", "--attack-images", "4", "--workers", "1"]
    options += ["--batch-size", "2", "--folder", str(tmp_path / "kept")]
    out = str(tmp_path / "rows.json")
    result = CliRunner().invoke(app, [*options, "--images", "4", "--out", out])
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = [one["rows"][0] for one in json.loads((tmp_path / "rows.json").read_text())["measured"]]
    assert f"{len(rows)} rows to measure, in about" in result.output
    assert result.output.count("; about") == len(rows) - 1, "after each row but the last"
    assert [row["model"] for row in rows if row["source"] == "hf"] == ["plain", "robust"]
    plain, robust = rows[:2]
    assert robust["robust_accuracy"] == 100.0 >= plain["robust_accuracy"]
    assert all(0 < row["model_share"] < 1 and row["waited_share"] >= 0 for row in rows)

    monkeypatch.setattr(process, None)  # nothing is measured again
    again = CliRunner().invoke(app, [*options, "--images", "4", "--format", "json"])
    assert "to measure" not in again.stderr
    assert again.exit_code == 0 and "attack-hf-robust-4-1-2-float32" in again.stderr
    printed = json.loads(again.stdout)
    assert len(printed) == len(rows) and all({"part": "attack"} | row in printed for row in rows)

    (file,) = (tmp_path / "kept").glob("rows-*/attack-hf-robust-*.json")
    content = json.loads(file.read_text())
    for change in ({"images_per_second": -1}, {"waited_share": 2.0}, {"peak_mb": "x"}):
        file.write_text(json.dumps(content | {"rows": [content["rows"][0] | change]}))
        monkeypatch.setattr(process, lambda *work: robust)
        repaired = CliRunner().invoke(app, [*options, "--images", "4"])
        assert "Damaged, and measured anew: attack-hf-robust-4-1-2-float32.json" in repaired.output
        assert json.loads(file.read_text())["rows"] == [robust]

    mine = tmp_path / "mine.json"
    mine.write_text('{"measured": [{"rows": [1]}]}')
    refused = CliRunner().invoke(app, [*options, "--out", str(mine)])
    assert refused.exit_code == 2 and "would not write again" in refused.output
    assert json.loads(mine.read_text()) == {"measured": [{"rows": [1]}]}


def test_the_expected_time_grows_with_the_images(files):
    few, many = (loading_seconds(files, images, 1) for images in (0, 10**6))
    assert few == START_SECONDS and many > few + 100
    robust, plain = (attack_seconds(0.5, model, 4) for model in ("robust", "plain"))
    assert (robust, plain) == (START_SECONDS + 22, START_SECONDS + 4)


def test_a_killed_row_goes_on_with_its_images_and_its_seconds(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(vit_s, "SIZES", SMALL)
    monkeypatch.setattr(attacking, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(attacking, "SAY_SECONDS", 0.0)
    work = ("hf", "robust", files, 0, 2, "float32", str(tmp_path), "one")
    decided = []

    def killed(self, progress, name):
        note(self, progress, name)
        decided.append(progress.decided)
        if progress.decided:
            raise KeyboardInterrupt

    note = attacking.Spent.note
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attacking.Spent, "note", killed)
        attacking.attacked(*work)
    (begun,) = tmp_path.glob("begun-*/one")
    before = json.loads((begun / "seconds.json").read_text())
    assert 0 < decided[-1] < 6 and before["all"] > before["model"] > 0
    assert f"one: {decided[-1]} of 6 images" in capsys.readouterr().out

    row = attacking.attacked(*work)
    assert row["killed"] == 1 and row["images"] == 6 and row["robust_accuracy"] == 100.0
    assert row["seconds"] > before["all"] and not begun.exists()


def test_parts_and_dtypes_that_are_none_are_named():
    for option, message in (("--parts", "attack, got 'x'"), ("--dtype", "bfloat16, got 'x'")):
        result = CliRunner().invoke(app, ["bench", "images", option, "x"], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in " ".join(result.output.split())
