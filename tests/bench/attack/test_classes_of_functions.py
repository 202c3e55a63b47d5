"""``ironmoe attack`` on what a user's function gives: names of classes count there, too."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app

FUNCTIONS = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1000))

class NoBatchWithoutImages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from ironmoe.moe import VMoE
        torch.manual_seed(0)
        self.body = VMoE(8, 4, 16, 2, 2, 16, 3, num_experts=2, top_k=1, moe_layers="last 1")
        torch.nn.init.constant_(self.body.head.bias, 0)
        self.body.head.bias.data[1] = 9

    def forward(self, x):
        assert len(x)
        return self.body(x)

def says_one():
    return NoBatchWithoutImages()

def data_set():
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(20) % 3)

IDS = ["n02123045", "n01440764", "n02123159"]

def labelled():
    return data_set().tensors

def with_ids(**options):
    images = data_set()
    images.classes = IDS
    return DataLoader(images, batch_size=6, **options)

def collated():
    return with_ids(collate_fn=torch.utils.data.default_collate)

def collated_otherwise():
    return with_ids(collate_fn=lambda items: torch.utils.data.default_collate(items))

def stream_of_ids():
    from ironmoe.attacks.data import ImageStream, Preprocessing, images_of
    return ImageStream(images_of(with_ids().dataset), Preprocessing())

def stream_with_logits():
    made = stream_of_ids()
    made.logits = torch.tensor([5, 6, 7])
    return made
"""
OPTIONS = ("--attack", "pgd", "--steps", 2, "--restarts", 1, "--eps", 2, "--no-checks", "--all",
           "--device", "cpu", "--model", "named_data:model")  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "named_data.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "named_data", raising=False)
    return tmp_path


@pytest.mark.parametrize(("logits", "routed"), [((0, 2, 0), 0), ((0, 1, 2), 7)])
def test_routing_is_looked_at_where_images_are_right(place, logits, routed):
    (place / "map.json").write_text(json.dumps(dict(zip("012", logits, strict=True))))
    attack("labelled", "--class-map", "map.json", "--model", "named_data:says_one", "--out", "run")
    found = json.loads((place / "run" / "report.json").read_text())
    assert found["report"]["clean"]["count"] == routed
    assert [row["images"] for row in found["routing"]] == [routed] * bool(routed)


def attack(function, *arguments, ok=True):
    options = ["attack", *OPTIONS, "--data", f"named_data:{function}", *arguments]
    result = CliRunner().invoke(app, [*map(str, options)], env={"COLUMNS": "200"})
    expected = 0 if ok else 2
    assert result.exit_code == expected, result.output + repr(result.exception)
    return " ".join(result.output.split())


GUESS = "standard order of ImageNet's, which is a guess"
OTHERWISE = "labels were taken as indices of the logits, whatever"


@pytest.mark.parametrize(
    ("function", "logits", "said", "about_map"),
    [
        ("with_ids", [281, 0, 282], GUESS, ""),
        ("collated", [281, 0, 282], GUESS, ""),
        ("collated_otherwise", [0, 1, 2], OTHERWISE, "got none for numbers, but n02123045"),
        ("stream_of_ids", [281, 0, 282], GUESS, ""),
        ("stream_with_logits", [5, 6, 7], "", "the stream in --data has logits of its own"),
    ],
)
def test_names_that_the_data_of_a_loader_or_a_stream_have_count(
    place, function, logits, said, about_map
):
    def labels(run):
        lines = Path(run, "images.jsonl").read_text().splitlines()
        return [json.loads(line)["label"] for line in lines]

    assert said in attack(function, "--out", "run")
    assert labels("run") == [logits[number % 3] for number in range(20)]

    (place / "map.json").write_text(json.dumps({"n02123045": 9, "n01440764": 8, "n02123159": 7}))
    told = attack(function, "--class-map", "map.json", "--out", "mapped", ok=not about_map)
    if about_map:
        assert about_map in told
    else:
        assert labels("mapped") == [9 - number % 3 for number in range(20)]
