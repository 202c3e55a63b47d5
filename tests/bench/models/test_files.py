"""``--model FILE``: TorchScript and programs of torch.export."""

import hashlib
import re
import warnings

import pytest
import torch
from torch import nn

from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.bench.models.load import load_model
from ironmoe.moe import CheckpointError, VMoE

CPU = torch.device("cpu")
ANY = ({0: torch.export.Dim.DYNAMIC},)


class Net(nn.Module):
    """Dropout shows whether the mode is right, batch norm has buffers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.drop(self.body(x).relu()))


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ts", ".pt2", ".PT", ".PTH", ".PT2"])
def test_a_file_computes_what_its_module_did_and_has_gradients(suffix, tmp_path):
    model, file = Net().eval(), tmp_path / f"net{suffix}"
    if suffix.lower() == ".pt2":
        images = torch.rand(2, 3, 8, 8)
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=ANY), file)
    else:
        scripted(model).save(file)
    loaded = load_model(None, str(file), CPU)
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert loaded.identity == f"{file} (SHA-256 {content})" and loaded.pipeline is None
    assert loaded.image_shape == ((3, 8, 8) if suffix.lower() == ".pt2" else None)

    pixels = torch.rand(5, 3, 8, 8, requires_grad=True)
    ours, theirs = loaded.model(pixels), model(pixels)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(each[:, 0].sum(), pixels)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    loaded.model.train().eval()  # an evaluation does so
    torch.testing.assert_close(loaded.model(pixels), theirs)


def test_a_program_with_experts_runs_and_has_gradients(tmp_path):
    torch.manual_seed(0)
    arguments = {
        "image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16,
        "num_classes": 4, "moe_layers": (1,), "num_experts": 4, "channels": 1,
    }  # fmt: skip
    model = VMoE(**arguments).eval()
    nn.init.normal_(model.head.weight)
    pixels = torch.rand(3, 1, 8, 8)
    program = torch.export.export(model, (pixels,), dynamic_shapes=ANY)
    torch.export.save(program, tmp_path / "moe.pt2")
    loaded = load_model(None, str(tmp_path / "moe.pt2"), CPU)
    more = torch.rand(5, 1, 8, 8, requires_grad=True)
    torch.testing.assert_close(loaded.model(more), model(more), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loaded.model(more).square().sum(), more)
    assert gradient.abs().sum() > 0


def test_what_is_wrong_with_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, images = Net().eval(), torch.rand(2, 3, 8, 8)
    torch.save(model.state_dict(), "weights.pt")
    torch.export.save(torch.export.export(model, (images,)), "two.pt2")
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.rand(3, 4),)), "flat.pt2")
    (tmp_path / "empty.pt2").write_bytes(b"")
    cases = {
        "no.pt": "must be a file, and there is none at",
        "no.pt2": "must be a file, and there is none at",
        "weights.pt": "needs the code of its model: give timm:NAME?checkpoint=weights.pt, or a",
        "two.pt2": "was exported for 2 images at a time; export it for any number: torch.export",
        "flat.pt2": "must take images (B, C, H, W) as its only input, got inputs [(3, 4)]",
        "empty.pt2": "holds no program of torch.export that can be read here",
        "weights.pt?wings=2": "may set nothing, got wings='2'",
    }
    for spec, message in cases.items():
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_model(None, spec, CPU)


class Constant(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.full((3, 4), weight)

    def forward(self, x):
        return x.mean((2, 3)) @ self.weight


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_file_with_other_constants_is_another_model(suffix, tmp_path):
    """By the file, and where its name says nothing, by the module."""
    file, images, seen = tmp_path / f"net{suffix}", torch.rand(2, 3, 8, 8), []
    for weight in (1.0, 2.0):
        model = Constant(weight).eval()
        if suffix == ".pt":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.jit.freeze(torch.jit.script(model)).save(file)
        else:
            torch.export.save(torch.export.export(model, (images,), dynamic_shapes=ANY), file)
        loaded = load_model(None, str(file), CPU)
        assert loaded.identity == load_model(None, str(file), CPU).identity
        assert not loaded.model.state_dict()
        seen.append((loaded.identity, model_digest(loaded.model)))
    (name, digest), (other_name, other_digest) = seen
    assert name != other_name and digest != other_digest
