"""``FILE.pt``: a TorchScript module."""

import warnings
from pathlib import Path

import torch

from ironmoe.bench.common.query import read_known
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.registry import Source, register_files
from ironmoe.moe.checkpoints.errors import CheckpointError


@register_files(".pt", ".pth", ".ts", ".torchscript", form="FILE.pt (TorchScript)")
def load_torchscript(source: Source) -> LoadedModel:
    """The module of ``torch.jit.save``, from images to logits.

    Raises:
        CheckpointError: there is no such file, or it holds something else, such as weights alone.
    """
    read_known(source.spec, source.query, {})
    path = Path(source.path)
    if not path.is_file():
        raise CheckpointError(f"{source} must be a file, and there is none at {path.absolute()}")
    try:
        with warnings.catch_warnings():  # TorchScript is deprecated, but the file is there
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.jit.load(str(path), map_location=source.device)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source} holds no TorchScript module. What torch.save has written needs the code of "
            f"its model: give timm:NAME?checkpoint={path.name}, or a function that returns the "
            f"model, package.module:function ({_first_sentence(error)})"
        ) from error
    return LoadedModel(Classifier(model), path.stem, None, None, facts_of(path.stem))


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
