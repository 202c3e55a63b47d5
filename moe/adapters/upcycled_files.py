"""Upcycled models of any library in files: weights by safetensors, the recipe in its metadata."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ironmoe.kernels.checks import check_module
from ironmoe.moe.adapters.recipe import KEY, Recipe, steps_of
from ironmoe.moe.adapters.recorded import recipe_of_model
from ironmoe.moe.adapters.upcycle import upcycle_by_recipe
from ironmoe.moe.checkpoints.safetensors_files import safetensors_module
from ironmoe.moe.sharded import is_sharded

_PathLike = str | os.PathLike[str]
# The longest header that safetensors itself reads, in bytes.
_LONGEST_HEADER = 100_000_000


def save_upcycled(model: nn.Module, path: _PathLike) -> None:
    """Write the weights of an upcycled model to a safetensors file, with its recipe in the
    metadata.

    Raises:
        ValueError: no MLP of the model was upcycled, or its weights are shared out over processes.
        ImportError: the safetensors package is missing.
        TypeError: the model is no module.
    """
    check_module(model)
    if is_sharded(model):
        # to gather them is an exchange, which would wait for ever where one process calls this
        raise ValueError(
            f"model must have whole weights, got a {type(model).__name__} whose weights are shared "
            "out over processes: let each of them call ironmoe.moe.distributed.save_weights, and "
            "keep recipe_of(model) for upcycle_by_recipe"
        )
    recipe = recipe_of_model(model)
    if recipe is None:
        raise ValueError(
            f"model must have been upcycled, got a {type(model).__name__} without such a layer"
        )
    safetensors_module().torch.save_model(
        model, os.fspath(path), metadata={KEY: json.dumps(recipe)}
    )


def recipe_of(source: nn.Module | _PathLike) -> Recipe | None:
    """The recipe of an upcycled model, a dict that JSON can hold. It goes with weights that you
    save in your own way, to ``upcycle_by_recipe``.

    Args:
        source: a model; a file of ``save_upcycled``; or a folder of transformers'
            ``save_pretrained``.

    Returns:
        None for a model that was not upcycled, and a file or folder of anything else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a recipe of a newer format.
    """
    if isinstance(source, nn.Module):
        return recipe_of_model(source)
    path = Path(source)
    recipe = _in_folder(path) if path.is_dir() else _in_file(path)
    if recipe is not None:
        steps_of(recipe)
    return recipe


def load_upcycled(model: nn.Module, path: _PathLike) -> nn.Module:
    """Upcycle a dense model by the recipe in a file of ``save_upcycled``, and load its weights.

    Args:
        model: the dense model, built as it was before. Its own weights do not matter.

    Returns:
        The same model; for a single MLP, its MoE.

    Raises:
        ValueError: the file has no recipe or one that does not fit the model.
        RuntimeError: the weights are not those of the model, every one of them.
        FileNotFoundError: there is no such file.
        ImportError: the safetensors package is missing.
        TypeError: the model is no module.
    """
    check_module(model)
    recipe = _in_file(Path(path))
    if recipe is None:
        raise ValueError(f"path must be a file that save_upcycled wrote, got {path}")
    upcycled = upcycle_by_recipe(model, recipe)
    safetensors_module().torch.load_model(upcycled, os.fspath(path))
    return upcycled


def _in_folder(folder: Path) -> Recipe | None:
    config = folder / "config.json"
    if not config.is_file():
        return None
    content = _parsed(config.read_bytes())
    return content.get(KEY) if isinstance(content, dict) else None


def _in_file(path: Path) -> Recipe | None:
    """From the header of a safetensors file: 8 bytes for its length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = _parsed(file.read(length)) if length <= _LONGEST_HEADER else None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    return None if text is None else _parsed(text)


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
