"""Weights files: what is taken out of them, and what is said if they do not fit."""

import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.weights import load_file_into, read_weights
from ironmoe.moe import CheckpointError, save_upcycled, upcycle


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {"model_state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {"1.weight": state["1.bias"]}, "state_dict_ema": state},
    ],
    ids=["bare", "state_dict", "model", "DataParallel", "compiled", "averaged"],
)
def test_weights_are_found_in_what_training_scripts_write(wrap, tmp_path):
    model, other = net(), net()
    torch.save(wrap(model.state_dict()), "file.pth")
    load_file_into(other, tmp_path / "file.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_wrapper_takes_its_own_weights_and_those_of_the_model_inside(tmp_path):
    model = Classifier(net(), [0.5] * 3, [0.5] * 3)
    for state in (model.state_dict(), model.model.state_dict()):
        save_file({k: v.clone() for k, v in state.items()}, "file.safetensors")
        other = Classifier(net(), [0.1] * 3, [0.2] * 3)
        load_file_into(other, tmp_path / "file.safetensors")
        assert torch.equal(other.model[1].weight, model.model[1].weight)
        assert other.mean.flatten().tolist() == pytest.approx([0.1] * 3)  # of the preprocessing


class Staged(nn.Module):
    """A dense MLP that ``upcycle`` finds."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(OrderedDict(fc1=nn.Linear(3, 8), act=nn.GELU(), fc2=nn.Linear(8, 3)))
            for _ in range(2)
        )

    def forward(self, images):
        values = images.mean((2, 3))
        for block in self.blocks:
            values = values + block(values)
        return values


def bare(model):
    return model


@pytest.mark.parametrize(
    ("saved", "loaded"), [(bare, bare), (bare, Classifier), (Classifier, Classifier)]
)
def test_an_upcycled_file_upcycles_the_model_that_was_upcycled(saved, loaded, tmp_path):
    model, other = saved(Staged()), loaded(Staged())
    upcycle(model, 4, 2, noise=0.5)
    save_upcycled(model, tmp_path / "up.safetensors")
    load_file_into(other, tmp_path / "up.safetensors")
    pixels = torch.rand(5, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(other.eval()(pixels), model.eval()(pixels))


def test_a_model_of_ones_own_may_have_weights_called_mean(tmp_path):
    class Shift(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.mean = nn.Parameter(torch.tensor([value]))

    torch.save(Shift(3.0).state_dict(), "file.pth")
    model = Shift(0.0)
    load_file_into(model, tmp_path / "file.pth")
    assert model.mean.item() == 3


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = net().state_dict()
    state["1.weight"] = torch.zeros(5, 3)
    state["3.bias"] = state.pop("2.bias")
    torch.save(state, "file.pth")
    message = (
        "missing: 2.bias; left over: 3.bias; of another shape: 1.weight (5, 3) where the model has "
        "(2, 3)"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_file_into(net(), tmp_path / "file.pth")
    torch.save({f"layer{i}": torch.zeros(1) for i in range(9)}, "other.pth")
    with pytest.raises(CheckpointError, match="layer3 and 5 more"):
        load_file_into(net(), tmp_path / "other.pth")


class Anything:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Anything(), "must hold tensors alone, because unpickling anything else may run"),
        ({"epoch": 3}, "must hold tensors by name, or such a dict under one of"),
        ([1, 2], "must hold a state_dict, got list"),
    ],
)
def test_files_with_something_else_are_refused(content, message, tmp_path):
    torch.save(content, "file.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "file.pth")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    for name in ("broken.pth", "none.pth", "none.safetensors"):
        with pytest.raises(CheckpointError, match=f"checkpoint .*{name}"):
            read_weights(tmp_path / name)
