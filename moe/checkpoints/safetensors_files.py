"""Tensors in safetensors files: written one after another, and found again by their names.

The package safetensors writes what is held at once; here a file is written while its tensors are
gathered. Source of the format: github.com/huggingface/safetensors. Names of several files, and
their index, are those of Hugging Face.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.moe.checkpoints.errors import CheckpointError, reading, require

SUFFIX = ".safetensors"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def safetensors_module() -> Any:
    """safetensors, or an ImportError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("this needs safetensors: pip install safetensors") from error
    return safetensors


def planned_files(
    file: Path, entries: Iterable[Entry], max_file_bytes: int
) -> dict[Path, list[Entry]]:
    """Which tensors come into which file: into this one if they fit, else into several beside it.
    A tensor that is larger than the limit has a file of its own."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {file: groups[0]}
    return {
        file.with_name(f"{file.stem}-{i:05d}-of-{len(groups):05d}{SUFFIX}"): group
        for i, group in enumerate(groups, 1)
    }


def write_files(file: Path, plan: Mapping[Path, list[Entry]], tensors: Iterable[Tensor]) -> None:
    """Write the tensors, which come in the order of the plan.

    All files are written whole under temporary names and renamed then. A call that is interrupted
    leaves the older file or files, none, or the new ones, and never a mixture.
    """
    in_order = iter(tensors)
    unfinished = {target.with_name(f".tmp.{target.name}"): target for target in plan}
    index = _index_file(file)
    try:
        for temporary, target in unfinished.items():
            with open(temporary, "wb") as stream:
                stream.write(_header(plan[target]))
                for entry in plan[target]:
                    stream.write(_bytes(next(in_order), entry))
                stream.flush()
                os.fsync(stream.fileno())

        former = _former_files(file) - set(plan)
        if len(plan) > 1:
            index.unlink(missing_ok=True)
        for temporary, target in unfinished.items():
            temporary.replace(target)
        if len(plan) > 1:
            _write_index(index, plan)
            former.add(file)
        else:
            former.add(index)
    finally:
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)
    for left in former:
        left.unlink(missing_ok=True)


def find_tensors(file: Path) -> dict[str, Path]:
    """Names of tensors to the files that hold them: the file, or those that its index names.

    CheckpointError: neither is there, or it is damaged.
    """
    if file.is_file():
        with opened(file) as content:
            return dict.fromkeys(content.keys(), file)

    index = _index_file(file)
    require(index.is_file(), file, "no such file", f"it, or {index.name} beside it")
    return _indexed(index)


def opened(file: Path) -> Any:
    """The file as safetensors opens it: ``with opened(file) as content``.

    CheckpointError: it is missing or damaged.
    """
    safe_open = safetensors_module().safe_open
    require(file.is_file(), file, "no such file", "a safetensors file")
    with reading(file, "a safetensors file"):
        return safe_open(file, framework="pt", device="cpu")


def _index_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.index.json")


def _indexed(index: Path) -> dict[str, Path]:
    """Names of tensors to files beside the index."""
    with reading(index, "an index of safetensors files"):
        names = json.loads(index.read_bytes())["weight_map"]
        return {name: index.parent / Path(inside).name for name, inside in names.items()}


def _former_files(file: Path) -> set[Path]:
    """The files of a former save in several files."""
    try:
        found = set(_indexed(_index_file(file)).values())
    except CheckpointError:
        return set()
    own = re.compile(rf"{re.escape(file.stem)}-\d{{5}}-of-\d{{5}}{SUFFIX}")
    return {path for path in found if own.fullmatch(path.name)}


def _header(entries: list[Entry]) -> bytes:
    """Eight bytes with the length of what follows, and as JSON where each tensor will lie."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        described[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor, entry: Entry) -> memoryview:
    if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
        raise ValueError(f"tensor must be {entry}, got {tensor.dtype} of {tuple(tensor.shape)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_index(index: Path, plan: Mapping[Path, list[Entry]]) -> None:
    """The index names a file for each tensor; it is there whole or not at all."""
    size = sum(entry.nbytes for entries in plan.values() for entry in entries)
    names = {entry.name: file.name for file, entries in plan.items() for entry in entries}
    temporary = index.with_name(f".tmp.{index.name}")
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(index)
