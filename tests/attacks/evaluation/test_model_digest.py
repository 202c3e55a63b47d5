"""A journal goes on for the model that it was begun for: what tells one model from another."""

import hashlib
import importlib
import inspect
import io
import sys
import warnings

import pytest
import torch
from torch import nn

from ironmoe.attacks import FGSM, JournalError, evaluate
from ironmoe.attacks.evaluation.checksum import model_digest

ANY = ({0: torch.export.Dim.DYNAMIC},)


class Scaled(nn.Module):
    """Tensors that are in no state_dict: an attribute, a buffer, a constant of the code."""

    def __init__(self, weight=1.0, shift=0.0, factor=1.0):
        super().__init__()
        self.weight = torch.full((3, 4), weight)
        self.register_buffer("shift", torch.full((4,), shift), persistent=False)
        self.factor = factor

    def forward(self, x):
        return self.factor * x.mean((2, 3)) @ self.weight + self.shift


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def scripted(model, *, freeze=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = torch.jit.script(model.eval())
        return torch.jit.freeze(made) if freeze else made


def exported(model):
    return torch.export.export(model, (torch.rand(2, 3, 2, 2),), dynamic_shapes=ANY).module()


class Packed(nn.Module):
    """Its weights are in the state_dict as those of torch's quantised layers are."""

    def __init__(self, weight):
        super().__init__()
        self._packed = torch.full((3, 4), weight), None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}_packed"] = self._packed


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Calling(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


PAIRS = {
    "attribute": (Scaled, lambda: Scaled(weight=2.0)),
    "buffer that is not saved": (Scaled, lambda: Scaled(shift=2.0)),
    "number": (Scaled, lambda: Scaled(factor=2.0)),
    "frozen": (lambda: scripted(Net(), freeze=True), lambda: scripted(Net(1), freeze=True)),
    "frozen, inside": (
        lambda: Around(scripted(Net(), freeze=True)),
        lambda: Around(scripted(Net(1), freeze=True)),
    ),
    "number in TorchScript": (lambda: scripted(Scaled()), lambda: scripted(Scaled(factor=2.0))),
    "tensor in TorchScript": (lambda: scripted(Scaled()), lambda: scripted(Scaled(weight=2.0))),
    "constant of a program": (lambda: exported(Scaled()), lambda: exported(Scaled(weight=2.0))),
    "code of a program": (lambda: exported(Scaled()), lambda: exported(Scaled(factor=2.0))),
    "quantised": (lambda: Packed(1.0), lambda: Packed(2.0)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_models_that_differ_in_what_no_state_dict_holds_are_told_apart(case):
    one, other = PAIRS[case]
    assert model_digest(one()) == model_digest(one())
    assert model_digest(one()) != model_digest(other())


@pytest.mark.parametrize("freeze", [False, True])
def test_a_torchscript_file_has_one_digest_however_often_it_is_read_run_and_written(
    freeze, tmp_path
):
    files = [tmp_path / "net.pt", tmp_path / "again.pt"]
    scripted(Net(), freeze=freeze).save(files[0])
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for file in (files[0], *files):
            model = torch.jit.load(file)
            seen.append(model_digest(model))
            for _ in range(3):  # TorchScript compiles on the way
                model(torch.rand(2, 3, 4, 4))
            seen.append(model_digest(model))
            model.save(files[1])
    assert len(set(seen)) == 1


def test_torchscript_that_no_file_can_hold_is_told_by_its_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, same, other = (
            torch.jit.trace(nn.Sequential(Net(seed), Calling()).eval(), torch.rand(2, 3, 4, 4))
            for seed in (0, 0, 1)
        )
        with pytest.raises(RuntimeError, match="Python"):
            torch.jit.save(first, io.BytesIO())
    assert model_digest(first) == model_digest(same) != model_digest(other)


def test_the_digest_of_a_module_with_parameters_is_that_of_earlier_journals():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    earlier = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        earlier.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        earlier.update(tensor.numpy().tobytes())
    assert model_digest(model) == earlier.hexdigest()
    model.shift = torch.ones(3)  # nor did an attribute count beside parameters
    assert model_digest(model) == earlier.hexdigest()


def test_the_file_of_a_class_without_parameters_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "import torch\nSHIFT = 1\nclass Net(torch.nn.Module):\n    pass\n"
    seen = []
    for number in range(3):
        (tmp_path / "edited_net.py").write_text(text.replace("1", str(number // 2)))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "edited_net", raising=False)
        seen.append(model_digest(importlib.import_module("edited_net").Net()))
    assert seen[0] == seen[1] != seen[2]


def test_a_class_whose_source_cannot_be_read_is_warned_of():
    space = {"nn": nn, "__name__": "nowhere"}
    exec("class Typed(nn.Module): pass", space)
    with pytest.raises(TypeError):
        inspect.getsource(space["Typed"])
    with pytest.warns(UserWarning, match="Typed has no parameters, and its source cannot be read"):
        model_digest(space["Typed"]())


def test_a_journal_is_refused_for_another_frozen_model(tmp_path):
    data = torch.rand(8, 3, 4, 4), torch.arange(8) % 4
    folder = tmp_path / "journal"

    def run(seed):
        model = scripted(Net(seed), freeze=True)
        return evaluate(model, data, {"fgsm": FGSM(model, 0.1)}, journal=folder, checks=False)

    once = run(0)
    assert torch.equal(run(0).clean_correct, once.clean_correct)
    with pytest.raises(JournalError, match="model must be as in the journal"):
        run(1)
