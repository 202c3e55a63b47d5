"""Tensors in the files of ``torch.distributed.checkpoint`` (DCP), each process its parts."""

import pathlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.moe.checkpoints.errors import CheckpointError
from ironmoe.moe.checkpoints.folder import Checksum, checksum_of_file, require_whole
from ironmoe.moe.parallel.together import by_all, naming_ranks, number_of_processes, process_number

_METADATA = ".metadata"


def write_tensors(data: Path, tensors: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """Write the tensors into an empty folder. Returns the checksums of all files in every process.

    CheckpointError, in every process: one of them could not write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = FileSystemWriter(data, sync_files=True)
    _run(lambda: save(dict(tensors), storage_writer=writer), data, "saving a checkpoint")

    def own_files() -> dict[str, Checksum]:
        """DCP begins the names of what a process writes with its number."""
        own = sorted(data.glob(f"__{process_number()}_*"))
        if process_number() == 0:
            own.append(data / _METADATA)
        return {file.name: checksum_of_file(file) for file in own}

    return {name: checksum for files in by_all(own_files) for name, checksum in files.items()}


def read_tensors(data: Path, files: Mapping[str, Checksum], targets: Mapping[str, Tensor]) -> None:
    """Fill the targets, each process its parts, when every file was found to be whole.

    CheckpointError, in every process: a file is missing or damaged.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    def check_share() -> None:
        for name in sorted(files)[process_number() :: number_of_processes()]:
            require_whole(data, name, files[name])

    class Reader(FileSystemReader):
        """FileSystemReader unpickles what a file names; this one knows what may be named."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(data / _METADATA, "rb") as file:
                return _Descriptions(file).load()

    by_all(check_share)
    reader = Reader(data)
    _run(lambda: load(dict(targets), storage_reader=reader), data, "loading a checkpoint")


def _run(work: Callable[[], Any], data: Path, what: str) -> None:
    """DCP hands every process the errors of all; but not that of one that has ended."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with naming_ranks(what), warnings.catch_warnings():
            # of one process that is alone on purpose
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            work()
    except CheckpointException as error:
        number, (reason, _) = next(iter(error.failures.items()))
        where = f"rank {number}: {data}" if number_of_processes() > 1 else str(data)
        raise CheckpointError(f"{where}: {type(reason).__name__}: {reason}") from error


class _Descriptions(pickle.Unpickler):
    """Makes descriptions of tensors and files, and nothing else that a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath  # of whatever system
        known = (module, name) in _OTHERS
        if module in ("torch", _METADATA_MODULE):
            found = super().find_class(module, name)
            known |= isinstance(found, torch.dtype) or (
                isinstance(found, type) and found.__module__ == _METADATA_MODULE
            )
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} is no description of a tensor")
        return super().find_class(module, name)


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
