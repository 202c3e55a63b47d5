"""``ironmoe attack --offload-experts`` and ``--recompute``."""

import json
from contextlib import ExitStack

import pytest
import torch
from typer.testing import CliRunner

from ironmoe.bench.attack import afterwards
from ironmoe.bench.cli.app import app
from ironmoe.bench.models.memory import save_memory
from ironmoe.moe import MoE
from ironmoe.moe.example import trained_model

EXAMPLE = "ironmoe.moe.example:trained_model"


@pytest.fixture
def attack(monkeypatch, no_pictures):
    monkeypatch.setattr(afterwards, "measure_routing", lambda *_, **__: {"images": 0})

    def run(*arguments, model=EXAMPLE, code=0):
        usual = (
            "--data",
            "digits",
            "--attack-images",
            "8",
            "--steps",
            "2",
            "--no-checks",
            "--eps",
            "8",
        )
        command = ["attack", "--model", model, *usual, "--device", "cpu", *arguments]
        result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output + repr(result.exception)
        return " ".join(result.output.split())

    return run


def test_they_change_no_verdict(attack, tmp_path):
    attack("--out", str(tmp_path / "plain"))
    output = attack("--out", str(tmp_path / "small"), "--offload-experts", "--recompute")
    plain, small = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "small")
    )
    assert small["worst_case"] == plain["worst_case"]
    assert small["report"]["attacks"] == plain["report"]["attacks"]
    assert "saves memory of a GPU" in output


@pytest.mark.parametrize("option", ["--offload-experts", "--recompute"])
def test_a_dense_model_is_refused_in_one_line(attack, tmp_path, monkeypatch, option):
    (tmp_path / "dense_for_memory.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = "dense_for_memory:make"
    output = attack(option, "--out", str(tmp_path / "run"), model=model, code=2)
    assert f"ironmoe: {option}" in output
    assert "MoE" in output.partition("ironmoe: ")[2]


def test_the_model_is_as_before_when_the_block_ends():
    model = trained_model()
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    layers[1].recompute = True
    with ExitStack() as within:
        save_memory(model, torch.device("cpu"), within, offload=True, recompute=True)
        assert all(layer.recompute and layer.offloaded is not None for layer in layers)
    assert [layer.recompute for layer in layers] == [False, True]
    assert all(layer.offloaded is None for layer in layers)
