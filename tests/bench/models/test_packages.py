"""A library that is missing or broken: named, with the command that repairs it."""

import re
import sys

import pytest
import torch

from ironmoe.bench.models.load import load_model
from ironmoe.bench.models.packages import imported, torchvision_command
from ironmoe.moe import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a module that is found before any that is installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        for known in [each for each in sys.modules if each.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
        (tmp_path / f"{name}.py").write_text(text)

    return write


@pytest.mark.parametrize("name", ["timm", "torchvision", "robustbench", "transformers"])
def test_what_is_not_installed_is_named_with_its_command(name, monkeypatch):
    for known in [each for each in sys.modules if each.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, name, None)  # its import raises ModuleNotFoundError
    prefix = {"transformers": "hf"}.get(name, name)
    with pytest.raises(CheckpointError) as error:
        load_model(None, f"{prefix}:model", CPU)
    commands = {
        "torchvision": torchvision_command(),
        "robustbench": "pip install git+https://github.com/RobustBench/robustbench.git",
    }
    command = commands.get(name, f"pip install {name}")
    assert f"needs the package {name}, which is not installed: {command}" in str(error.value)


@pytest.mark.parametrize(
    "failure",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "raise OSError('torchvision/_C.so: undefined symbol: _ZN3c10')",
        "raise AttributeError(\"partially initialized module 'torchvision' has no 'extension'\")",
    ],
)
def test_a_torchvision_of_another_torch_is_explained(failure, package):
    package("timm", failure)
    with pytest.raises(CheckpointError) as error:
        load_model(None, "timm:resnet18", CPU)
    message = str(error.value)
    assert f"torchvision was built for another torch than {torch.__version__}" in message
    assert message.endswith(torchvision_command())


def test_an_error_that_torchvision_raises_is_explained_without_its_name(package):
    package("torchvision", "raise RuntimeError('operator nms does not exist')")
    package("timm", "import torchvision")
    with pytest.raises(CheckpointError, match="torchvision was built for another torch"):
        imported("timm", "model")


def test_what_a_library_lacks_is_named(package):
    package("timm", "import no_such_package")
    message = "needs timm, which needs the package no_such_package, which is not installed: pip"
    with pytest.raises(CheckpointError, match=message):
        imported("timm", "model")
    package("timm", "raise ValueError('broken')")
    with pytest.raises(CheckpointError, match="needs timm, whose import fails: ValueError: broken"):
        imported("timm", "model")


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("2.10.0+cpu", "'torchvision==0.25.*' --index-url https://download.pytorch.org/whl/cpu"),
        ("2.13.1", "'torchvision==0.28.*'"),
        ("2.9.1+cu126", "'torchvision==0.24.*' --index-url https://download.pytorch.org/whl/cu126"),
    ],
)
def test_the_command_names_the_torchvision_of_this_torch(version, command, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert re.fullmatch(f"pip install .*{re.escape(command)}", torchvision_command())
