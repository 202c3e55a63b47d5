"""One model in several processes: what it is before the first step, and what they exchange beside
gradients.

Data parallel is without the wrapper DistributedDataParallel: a step may hold several backward
passes, some of them for a part of the weights. With one process each function does what a program
without ``torch.distributed`` would do.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ironmoe.moe.parallel.alone import is_alone

T = TypeVar("T")
SUMS = MixedPrecisionPolicy(reduce_dtype=torch.float64)  # as gradients.py has them


def prepared(model: nn.Module, *, fsdp: bool, device: torch.device) -> nn.Module:
    """The model on the device, with the parameters and buffers of process 0 in every process.

    Args:
        model: it is changed in place.
        fsdp: FSDP2 shards the parameters of each block, and those outside the blocks together
            (``torch.distributed.fsdp.fully_shard``). A process alone shards nothing.

    Returns:
        The model. Compile it afterwards; wrap blocks for activation checkpointing before.
    """
    model = model.to(device)
    if number_of_processes() == 1:
        return model
    for tensor in (*model.parameters(), *model.buffers()):
        values = tensor.detach().contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), src=0)  # gloo has not all dtypes
        tensor.detach().copy_(values)

    if fsdp:
        mesh = init_device_mesh(device.type, (number_of_processes(),))
        # FSDP2 otherwise keeps the root's parameters gathered after a pass without a backward
        # pass. Whoever changes the sharded ones then, as AWP does, would change nothing.
        for module in (*blocks(model), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=SUMS)
    return model


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model: what the outermost lists of modules hold that have several members,
    all of one class. A list of experts holds none, because an expert is not called in every process
    in every pass, as FSDP2 needs it."""
    for name, module in model.named_children():
        members = list(module.children())
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        if name == "experts":
            continue
        if is_list and len(members) > 1 and len({type(member) for member in members}) == 1:
            yield from (member for member in members if any(True for _ in member.parameters()))
        else:
            yield from blocks(module)


def number_of_processes() -> int:
    """1 where ``torch.distributed`` is not initialised, or this process trains by itself."""
    return 1 if is_alone() else dist.get_world_size()


def process_number() -> int:
    """From 0; 0 where this process trains by itself."""
    return 0 if is_alone() else dist.get_rank()


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Replace the running statistics of batch norm by their means over the processes, each of which
    has seen its own parts. Each process must call it once a step."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            buffer.copy_(mean_over_processes(buffer))


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what the processes give, of equal shapes, without a graph. Each process must call
    it."""
    values = values.detach()
    if number_of_processes() == 1:
        return values
    total = values / number_of_processes()  # a copy
    dist.all_reduce(total)
    return total


def gathered_parts(state: Mapping[str, T]) -> dict[str, T]:
    """What all processes keep, in every process; tensors must lie on the CPU. A name that ends in
    a number, as "delta.3", belongs to the part of a batch with this number: what the process that
    takes this part keeps under it. What others keep of it is older. Each process must call it."""
    world = number_of_processes()
    states = [dict(state)] * world
    if world > 1:
        dist.all_gather_object(states, states[0])
    together: dict[str, T] = {}
    for process, own in enumerate(states):
        for name, value in own.items():
            part = name.rpartition(".")[2]
            if not part.isdecimal() or int(part) % world == process:
                together.setdefault(name, value)
    return together
