"""What the tests of ``ironmoe attack`` start from."""

import sys

import numpy as np
import pytest
import torch

from ironmoe.bench.attack import report as evaluation_report
from ironmoe.bench.common.checkpoints import save_checkpoint
from ironmoe.moe import VMoE

PROGRAM = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a linear model of one's own and 40 images of 4 × 4, of which it
    gets most right."""
    (tmp_path / "small_models.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "small_models", raising=False)
    namespace = {}
    exec(PROGRAM, namespace)
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = namespace["linear"]()(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % 4
    np.savez("set.npz", images=images, labels=labels)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of the time, and some tests do not look at them."""
    monkeypatch.setattr(evaluation_report, "draw_evaluation", lambda outcome: {})


@pytest.fixture
def moe(tmp_path):
    """A checkpoint of an untrained model with experts, for data "digits"."""
    torch.manual_seed(0)
    arguments = {
        "image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16,
        "num_classes": 10,
        "moe_layers": (1,), "num_experts": 4, "channels": 1,
    }  # fmt: skip
    extra = {
        "name": "V-MoE",
        "seed": 0,
        "seconds": 1.0,
        "data": "digits",
        "checksum": "",
        "classes": [str(i) for i in range(10)],
    }
    file = tmp_path / "moe.safetensors"
    file.write_bytes(save_checkpoint(VMoE(**arguments), arguments, extra))
    return file
