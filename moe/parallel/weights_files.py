"""The weights of a model, sharded or not, in safetensors files of whole tensors, as others read
them."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.moe.checkpoints.errors import reading, require
from ironmoe.moe.checkpoints.safetensors_files import (
    DTYPES,
    SUFFIX,
    Entry,
    find_tensors,
    opened,
    planned_files,
    write_files,
)
from ironmoe.moe.parallel.model_state import model_tensors, require_names, set_model_tensors
from ironmoe.moe.parallel.together import by_all, naming_ranks, process_number
from ironmoe.moe.sharded import local_box, local_values, whole_tensor


def save_weights(
    file: str | os.PathLike[str], model: nn.Module, *, max_file_bytes: int = 5_000_000_000
) -> None:
    """Write the parameters and buffers of a model to a safetensors file, each as a whole tensor by
    the name that it has in the plain model. Every process must call it.

    Sharded tensors are gathered one after another, and process 0 writes each before the next one:
    beside its part of the model a process holds one whole tensor. Weights of more than
    ``max_file_bytes`` go to several files, ``model-00001-of-00003.safetensors`` and so on beside
    ``model.safetensors``, with an index ``model.safetensors.index.json``, as Hugging Face has them.

    All files are written under temporary names and renamed then. An interrupted call leaves the
    older weights, none, or the new ones, and never a mixture.

    Raises:
        ValueError: the file's name does not end with .safetensors.
        TypeError: a tensor has a dtype that the format has not.
        CheckpointError: process 0 could not write; the same error in all processes.
        ExchangeError: a process is missing.
    """
    file = Path(file)
    if file.suffix != SUFFIX:
        raise ValueError(f"file must have a name that ends with {SUFFIX}, got {file}")
    tensors = model_tensors(model)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"model must have tensors of {', '.join(DTYPES.values())}, got {tensor.dtype} as "
                f"{name}"
            )

    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # so that each is aligned in its file
    plan = planned_files(file, entries, max_file_bytes)
    gathered = _gathered(tensors, entries)

    def take_part() -> None:
        try:
            if process_number() == 0:
                write_files(file, plan, gathered)
        finally:
            deque(gathered, maxlen=0)  # the others wait for this process, too

    by_all(take_part)


def load_weights(file: str | os.PathLike[str], model: nn.Module) -> None:
    """Read a file of ``save_weights``, or any other with the names and shapes of the model, into
    the model. Each process reads the parts that it holds, and nothing else.

    Values are converted to the model's dtypes. All names and shapes are compared before the first
    value is set.

    Args:
        file: if there is no such file, its index beside it says which files there are.
        model: it has memory: after ``torch.device("meta")`` call ``model.to_empty(device=…)``.

    Raises:
        CheckpointError: a file is missing or damaged; names are missing or left over; a shape is
            another. It is the same error in all processes.
    """
    file = Path(file)
    tensors = model_tensors(model)

    def check() -> dict[Path, list[str]]:
        found = find_tensors(file)
        require_names(set(tensors), set(found), file)
        names: dict[Path, list[str]] = {}
        for name, inside in found.items():
            names.setdefault(inside, []).append(name)
        for inside, held in names.items():
            with opened(inside) as content, reading(inside, "the tensors of its index"):
                for name in held:
                    shape, own = content.get_slice(name).get_shape(), list(tensors[name].shape)
                    require(shape == own, f"{inside}: {name}", f"shape {shape}", f"{own}")
        return names

    by_file = by_all(check)[process_number()]
    by_all(lambda: _read(by_file, tensors))
    set_model_tensors(model, tensors)


@torch.no_grad()
def _read(by_file: Mapping[Path, list[str]], tensors: Mapping[str, Tensor]) -> None:
    for file, names in by_file.items():
        with opened(file) as content, reading(file, "a safetensors file"):
            for name in names:
                values = local_values(tensors[name])
                if values.numel():
                    values.copy_(_part(content, name, local_box(tensors[name])))


def _part(content: Any, name: str, box: tuple[tuple[int, int], ...]) -> Tensor:
    """What lies in a box of a tensor. The rest of it is not read."""
    if not box:
        return content.get_tensor(name)
    return content.get_slice(name)[tuple(slice(*axis) for axis in box)]


def _gathered(tensors: Mapping[str, Tensor], entries: list[Entry]) -> Iterator[Tensor]:
    """The whole tensors, one after another. All processes must go through it together."""
    for entry in entries:
        yield _whole(tensors[entry.name])  # no name, which would keep it while the next one comes


def _whole(tensor: Tensor) -> Tensor:
    with naming_ranks("gathering weights"):
        return whole_tensor(tensor)
