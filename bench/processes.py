"""One command on several processes, as ``torchrun`` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import typer

PATIENCE = timedelta(days=7)  # for slower processes; where one dies, torchrun ends the others


class Processes(NamedTuple):
    """This is process ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()


def is_first_process() -> bool:
    """The one that prints."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where each has one of its own."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise typer.BadParameter(f"torchrun --nproc-per-node must be at most the number of GPUs, {there}; or use --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Under ``torchrun``, this process among the others, joined through ``torch.distributed`` inside the block; else one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
