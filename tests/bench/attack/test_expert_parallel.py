"""``ironmoe attack --expert-parallel``: two processes hold the experts together."""

import importlib
import json

import numpy as np
import pytest
import torch
from two_processes import run_in_two_processes
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app
from ironmoe.bench.common.processes import GOES_ON, OtherProcessEnded, _other_end
from ironmoe.moe.distributed import ExchangeError

COMMON = ["--model", "small_moe:experts", "--data", "set.npz", "--all", "--device", "cpu"]
COMMON += ["--attack", "pgd", "--steps", "3", "--restarts", "1", "--eps", "1,4"]
MODEL = """
import torch
from ironmoe.moe import VMoE

def experts():
    torch.manual_seed(0)
    model = VMoE(8, 4, 16, 2, 2, 16, 3, (1,), 4, channels=1, classifier="gap")
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape)  # the head begins with zeros
    return model
"""
IMPORTS = """
import torch._dynamo, torch.distributed.tensor
from ironmoe.bench.attack import afterwards, report, run
from ironmoe.bench.__main__ import main

report.draw_evaluation = lambda outcome: {}  # pictures would take most of the time
"""
PROGRAM = """
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun says it
sys.argv = ["ironmoe", "attack", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def attack(*arguments, code=0):
    result = CliRunner().invoke(app, ["attack", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def written(folder):
    with np.load(folder / "images.npz") as file:
        return json.loads((folder / "report.json").read_text()), dict(file)


def test_two_processes_go_on_where_one_ended(tmp_path, no_pictures, monkeypatch):
    """One process begins a run and two with shared experts finish it; its verdicts are those of one
    process alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "small_moe.py").write_text(MODEL)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = importlib.import_module("small_moe").experts().eval()(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    np.savez("set.npz", images=images, labels=labels)

    attack(*COMMON, "--out", "one")
    attack(*COMMON, "--out", "two", "--max-forwards", 70, "--no-checks")
    begun = written(tmp_path / "two")[0]
    run_in_two_processes(
        PROGRAM, tmp_path, *COMMON, "--out", "two", "--expert-parallel", "2", before=IMPORTS
    )

    (one, alone), (two, shared) = written(tmp_path / "one"), written(tmp_path / "two")
    assert not begun["report"]["complete"] and two["report"]["complete"]
    assert (two["processes"], two["expert_parallel"], one["expert_parallel"]) == (2, 2, 1)
    assert two["settings"] == one["settings"]
    assert alone.keys() == shared.keys()
    for name, values in alone.items():
        if values.dtype.kind in "bi" and name.rpartition("/")[2] not in ("forwards", "backwards"):
            assert np.array_equal(values, shared[name]), name
    fell = sum(int(values.sum()) for name, values in alone.items() if name.endswith("fell"))
    assert 0 < fell < 17
    assert two["routing"] and len(two["routing"]) == len(one["routing"])
    for mine, other in zip(two["routing"], one["routing"], strict=True):
        assert mine["images"] == other["images"] and mine["layers"].keys() == other["layers"].keys()
    journals = sorted(p.name for p in (tmp_path / "two/results/journal").glob("journal-*.jsonl"))
    assert journals == ["journal-0.jsonl"]


@pytest.mark.parametrize(
    ("model", "world", "ranks", "said"),
    [
        ("moe", "1", 2, "must divide the number of processes, got 2 with 1"),
        ("moe", "3", 2, "must divide the number of processes, got 2 with 3"),
        ("moe", "3", 3, "got 3 with 4 experts in blocks.1.mlp"),
        ("dense", "2", 2, "which has none"),
        ("moe", "1", 0, "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_shared_out_is_said(place, request, model, world, ranks, said, monkeypatch):
    """Before processes join, so each can be run alone, as torchrun would start it."""
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "0")
    named = [request.getfixturevalue("moe"), "--data", "digits", "--device", "cpu"]
    if model == "dense":
        named = ["--model", "small_models:linear", "--data", "set.npz", "--all", "--device", "cpu"]
    assert said in attack(*named, "--expert-parallel", ranks, code=2)


def test_the_message_of_a_lost_process_names_its_rank():
    store = torch.distributed.HashStore()
    error = ExchangeError("a sum failed: rank 1 (process 7 on host) ended. (…)", "rank 1 ended")
    told = _other_end(error, store, rank=0)
    assert isinstance(told, OtherProcessEnded) and str(told) == f"rank 1 ended. {GOES_ON}"
    store.set("ironmoe/failed", "process 1 failed: OSError: full")
    assert str(_other_end(error, store, rank=0)).startswith("process 1 failed: OSError: full. ")
