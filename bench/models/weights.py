"""Weights from files: .safetensors, or what torch.save wrote; nothing is unpickled but tensors."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.bench.common.checkpoints import read_safetensors
from ironmoe.bench.models.classifier import Classifier
from ironmoe.moe import recipe_of, upcycle_by_recipe
from ironmoe.moe.checkpoints.errors import CheckpointError

# what training scripts put weights under; averaged weights first, as timm does
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
NORMALIZATION = {"mean", "std"}
PICKLED = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
FEW = 4


class WrongWeights(CheckpointError):
    """The tensors of a file are not those of the model."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name → tensor of a weights file: of a training script's file those under "state_dict_ema",
    "state_dict", "model" or the like; prefixes of DataParallel and torch.compile are taken off.

    Raises:
        CheckpointError: the file cannot be read, needs unpickling, or holds no tensors.
    """
    if path.suffix.lower() not in PICKLED:
        return _without_prefixes(read_safetensors(path)[0])
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is no file")

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} must hold tensors alone, because unpickling anything else may run "
            f"foreign code; save model.state_dict() ({_first_line(error)})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read by torch.load: {_first_line(error)}"
        ) from error

    for name in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"checkpoint {path} must hold a state_dict, got {type(found).__name__}"
        )
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"checkpoint {path} must hold tensors by name, or such a dict under one of "
            f"{', '.join(WRAPPERS)}, got the keys {', '.join(map(str, list(found)[:FEW]))}"
        )
    return _without_prefixes(tensors)


def load_file_into(model: nn.Module, path: Path) -> None:
    """``load_into`` of a weights file. One of ``save_upcycled`` says how the model was upcycled,
    and this one is upcycled so.

    Raises:
        CheckpointError: the file cannot be read, its tensors do not fit the model, or its recipe
            cannot be followed.
    """
    if path.suffix.lower() == ".safetensors" and path.is_file():
        try:
            recipe = recipe_of(path)
            if recipe is not None:
                upcycle_by_recipe(_named_by(recipe, model), recipe)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from error
    load_into(model, read_weights(path), path)


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the model these weights, all of them.

    A wrapper around the model takes weights of the model itself, too. Its normalization is no
    weight: it belongs to the preprocessing, and stays.

    Raises:
        WrongWeights: tensors are missing, left over or of another shape; it names them.
    """
    fixed = NORMALIZATION if isinstance(model, Classifier) else set()
    wanted = {name: value for name, value in model.state_dict().items() if name not in fixed}
    given = {name: value for name, value in tensors.items() if name not in fixed}
    if not wanted.keys() & given.keys():
        inside = {f"model.{name}": value for name, value in given.items()}
        given = inside if wanted.keys() & inside.keys() else given

    shapes = [
        f"{name} {tuple(given[name].shape)} where the model has {tuple(wanted[name].shape)}"
        for name in wanted.keys() & given.keys()
        if given[name].shape != wanted[name].shape
    ]
    wrong = {
        "missing": sorted(wanted.keys() - given.keys()),
        "left over": sorted(given.keys() - wanted.keys()),
        "of another shape": sorted(shapes),
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {_few(names)}" for what, names in wrong.items() if names)
        raise WrongWeights(f"checkpoint {path} holds weights of another architecture: {told}")
    model.load_state_dict(given, strict=False)


def _named_by(recipe: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """The module whose MLPs the recipe names: the model inside of a wrapper, unless the wrapper
    itself was upcycled."""
    if not isinstance(model, Classifier):
        return model
    inside = dict(model.model.named_modules())
    is_inside = all(name in inside for step in recipe["steps"] for name in step["mlps"])
    return model.model if is_inside else model


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    while found and (prefix := next((p for p in PREFIXES if _all_start(found, p)), None)):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _all_start(names: Mapping[str, Tensor], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _few(names: list[str]) -> str:
    more = len(names) - FEW
    return ", ".join(names[:FEW]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
