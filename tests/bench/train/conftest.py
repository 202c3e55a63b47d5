"""What the tests of ``ironmoe train`` start from."""

import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app
from ironmoe.bench.train.report import page

PROGRAM = """
import torch
from ironmoe.moe import Capacity, VMoE

SMALL = dict(image_size=8, patch_size=4, dim=16, depth=2, heads=2, mlp_dim=16, num_classes=4,
             channels=1, classifier="gap")

def moe():
    return VMoE(**SMALL, moe_layers=(0, 1), num_experts=4)

def crowded():
    return VMoE(**SMALL, moe_layers=(1,), num_experts=4, capacity=Capacity(1.0))

def dense():
    return VMoE(**SMALL)

def with_frozen_routers():
    model = moe()
    for block in model.blocks:
        block.mlp.router.requires_grad_(False)
    return model

def frozen():
    return moe().requires_grad_(False)

class Detached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 4)

    def forward(self, x):
        return self.head(x.detach().flatten(1))

def with_batch_norm():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 4))

class Breaks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Flatten(), torch.nn.Linear(64, 4)
        self.outer_passes = 0

    def forward(self, x):
        self.outer_passes += self.training
        y = self.second(self.first(x))
        return y * float("nan") if self.outer_passes > 5 else y

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.breaks = torch.nn.Flatten(), Breaks()

    def forward(self, x):
        return self.breaks(x)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in: models of one's own in small_models.py, and 48 images of 8 × 8 that are
    easy to tell: a class is a picture, its images are that picture under noise."""
    (tmp_path / "small_models.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "small_models", raising=False)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 4
    pictures = torch.rand(4, 1, 8, 8, generator=generator)
    noise = torch.rand(48, 1, 8, 8, generator=generator)
    np.savez("set.npz", images=0.8 * pictures[labels] + 0.2 * noise, labels=labels)
    return tmp_path


@pytest.fixture
def train():
    """Calls ``ironmoe train`` on the images of ``place``."""

    def call(*options, ok=True):
        arguments = ["train", "--data", "set.npz", "--device", "cpu", *map(str, options)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        if ok:
            assert result.exit_code == 0, result.output + repr(result.exception)
        return result

    return call


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take most of the time, and one test looks at them."""
    monkeypatch.setattr(page, "draw_training", lambda facts: {})
