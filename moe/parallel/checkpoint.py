"""Checkpoints of models in several processes: weights, an optimizer and a few numbers, saved by any
number of processes and loaded by any other (``torch.distributed.checkpoint``)."""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.moe.checkpoints import folder as folders
from ironmoe.moe.checkpoints.errors import require
from ironmoe.moe.parallel.dcp_files import read_tensors, write_tensors
from ironmoe.moe.parallel.model_state import model_tensors, require_names, set_model_tensors
from ironmoe.moe.parallel.optimizer_state import (
    empty_tensors,
    optimizer_options,
    optimizer_tensors,
    require_same_optimizer,
    set_optimizer_state,
)
from ironmoe.moe.parallel.together import (
    by_all,
    by_each,
    by_first,
    number_of_processes,
    process_number,
)

_PathLike = str | os.PathLike[str]
_MODEL, _OPTIMIZER = "model/", "optimizer/"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What ``load_checkpoint`` tells of the checkpoint that it has loaded.

    numbers: as ``save_checkpoint`` got them, through JSON: a tuple has become a list.
    world_size: how many processes saved it.
    meshes: the meshes of its sharded tensors, such as ({"fsdp": 2, "ep": 4},).
    resharded: whether the number of processes or the meshes are others now.
    ironmoe, torch: the versions that saved it.
    changes: what of all these is different now, each in words, such as "world_size: 2 there, 4
        now".
    """

    numbers: dict[str, Any]
    world_size: int
    meshes: tuple[dict[str, int], ...]
    resharded: bool
    ironmoe: str
    torch: str
    changes: tuple[str, ...]


def save_checkpoint(
    folder: _PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of the model, and of the optimizer if there is one. Each process writes
    what it holds; nothing is gathered. Every process must call it.

    Plain tensors, and parts that several processes hold, are written by one of them: buffers that
    differ between processes are those of one afterwards.

    Args:
        folder: on a file system that all processes see; it is made if need be. A checkpoint in it
            is replaced when the new one is whole; a process that is killed before leaves it as it
            was. Files of others in the folder are not touched.
        model: parameters may be plain tensors or DTensors: expert parallelism, FSDP2, or both.
        optimizer: of parameters of the model.
        numbers: of your own, such as {"epoch": 3}: what JSON can hold. Those of process 0 are kept;
            no other process needs any.

    Raises:
        CheckpointError: a process could not write; the same error in all processes, with its
            rank. The former checkpoint is there.
        ExchangeError: a process is missing. The former checkpoint is there.
        ValueError, TypeError: this process has what a checkpoint cannot hold; the others raise
            CheckpointError.
    """

    def contents() -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and the rest. What JSON cannot hold is refused before a file is made."""
        weights = model_tensors(model)
        options = None if optimizer is None else optimizer_options(model, optimizer)
        tensors = _prefixed(weights, _MODEL)
        if optimizer is not None:
            tensors |= _prefixed(optimizer_tensors(model, optimizer), _OPTIMIZER)
        rest = {
            **_made_by(weights),
            "tensors": {name: _described(tensor) for name, tensor in tensors.items()},
            "optimizer": options,
            "numbers": dict(numbers or {}) if process_number() == 0 else {},
        }
        json.dumps(rest)
        return tensors, rest

    tensors, content = by_each(contents)
    data = by_first(lambda: folders.begin(Path(folder)))
    files = write_tensors(data, tensors)
    by_first(lambda: folders.finish(data, files, content))


def load_checkpoint(
    folder: _PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> LoadedCheckpoint:
    """Read a checkpoint of ``save_checkpoint`` into a model, and into its optimizer if it is given.
    Every process must call it; each reads what it holds.

    The number of processes and the way in which the model is sharded may differ from those that
    saved. Everything is checked before the first value is set: names, shapes, dtypes, options, and
    the checksums of all files, each of which one process reads. Nothing is unpickled that could run
    code.

    Args:
        model: made as the one that was saved. It has memory: after ``torch.device("meta")`` call
            ``model.to_empty(device=…)``.
        optimizer: its options, such as the learning rate, become those that were saved.

    Raises:
        CheckpointError: a folder without a whole checkpoint, a damaged one, one of another format,
            or of another model or optimizer; the message names what differs. It is the same error
            in all processes.
        ExchangeError: a process is missing.
        ValueError: the model has no memory, the optimizer has parameters of another model. If that
            is so in some processes alone, the others raise CheckpointError.
    """

    def own() -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        options = None if optimizer is None else optimizer_options(model, optimizer)
        return model_tensors(model), options

    weights, options = by_each(own)
    saved = by_first(lambda: folders.describe(Path(folder)))
    by_all(lambda: _require_same(weights, options, saved, Path(folder)))

    state: dict[str, Tensor] = {}
    if optimizer is not None:
        described = {
            name.removeprefix(_OPTIMIZER): (getattr(torch, dtype), tuple(shape))
            for name, (dtype, shape) in saved["tensors"].items()
            if name.startswith(_OPTIMIZER)
        }
        state = empty_tensors(model, optimizer, described)
    targets = _prefixed(weights, _MODEL) | _prefixed(state, _OPTIMIZER)
    read_tensors(Path(folder) / saved["data"], saved["files"], targets)

    set_model_tensors(model, weights)
    if optimizer is not None:
        set_optimizer_state(model, optimizer, state, saved["optimizer"])
    now = _made_by(weights)
    differing = [key for key, value in now.items() if value != saved[key]]
    return LoadedCheckpoint(
        numbers=saved["numbers"],
        world_size=saved["world_size"],
        meshes=tuple(saved["meshes"]),
        resharded="world_size" in differing or "meshes" in differing,
        ironmoe=saved["ironmoe"],
        torch=saved["torch"],
        changes=tuple(f"{key}: {saved[key]} there, {now[key]} now" for key in differing),
    )


def _made_by(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint says of those who save it."""
    return {
        "ironmoe": _version(),
        "torch": str(torch.__version__),
        "world_size": number_of_processes(),
        "meshes": _meshes(weights),
    }


def _require_same(
    weights: Mapping[str, Tensor],
    options: Mapping[str, Any] | None,
    saved: Mapping[str, Any],
    folder: Path,
) -> None:
    """CheckpointError unless the checkpoint is of such a model and, if ``optimizer_options`` are
    given, such an optimizer."""
    file = folder / folders.DESCRIPTION
    expected = {name: _described(tensor) for name, tensor in weights.items()}
    found = {
        name.removeprefix(_MODEL): described
        for name, described in saved["tensors"].items()
        if name.startswith(_MODEL)
    }
    require_names(set(expected), set(found), file)
    for name, own in expected.items():
        words = f"{own[0]} of shape {own[1]}"
        require(found[name] == own, f"{file}: {name}", found[name], words)

    if options is not None:
        require(saved["optimizer"] is not None, file, "no optimizer", "one, as you gave one")
        require_same_optimizer(options, saved["optimizer"], file)


def _described(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _meshes(tensors: Mapping[str, Tensor]) -> list[dict[str, int]]:
    """The different meshes of the sharded tensors: names of dimensions to sizes."""
    found: list[dict[str, int]] = []
    for tensor in tensors.values():
        mesh: Any = getattr(tensor, "device_mesh", None)
        if mesh is not None:
            names = mesh.mesh_dim_names or map(str, range(mesh.ndim))
            sizes = dict(zip(names, mesh.shape, strict=True))
            if sizes not in found:
                found.append(sizes)
    return found


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _version() -> str:
    try:
        return importlib.metadata.version("ironmoe")
    except importlib.metadata.PackageNotFoundError:  # from a copy of the sources
        return "unknown"
