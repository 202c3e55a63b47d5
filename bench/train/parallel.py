"""One model in several processes: what it is before the first step, and what they exchange beside
gradients.

Data parallel is without the wrapper DistributedDataParallel: a step may hold several backward
passes, some of them for a part of the weights. With one process each function does what a program
without ``torch.distributed`` would do.
"""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ironmoe.moe.distributed import parallelize
from ironmoe.moe.exchange.group import every_rank
from ironmoe.moe.layers.ranks import same_values
from ironmoe.moe.parallel.blocks import blocks
from ironmoe.moe.parallel.together import number_of_processes

T = TypeVar("T")
# FSDP2 otherwise keeps the root's parameters gathered after a pass without a backward pass. Whoever
# changes the sharded ones then, as AWP does, would change nothing. Sums are as gradients.py has
# them.
FSDP_OPTIONS: dict[str, Any] = {
    "reshard_after_forward": True,
    "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float64),
}


def prepared(
    model: nn.Module, *, fsdp: bool, device: torch.device, expert_parallel: int = 1
) -> nn.Module:
    """The model on the device, with the parameters and buffers of process 0 in every process.

    Args:
        model: it is changed in place.
        fsdp: FSDP2 shards the parameters of each block, and those outside the blocks together
            (``torch.distributed.fsdp.fully_shard``). A process alone shards nothing.
        expert_parallel: over how many processes the experts of each layer are shared out; it
            divides their number.

    Returns:
        The model. Compile it afterwards; wrap blocks for activation checkpointing before.
    """
    world = number_of_processes()
    if world == 1:
        return model.to(device)
    options = FSDP_OPTIONS if fsdp else {}
    if expert_parallel > 1:
        # its advice on how to gather weights faster; they are gathered once an epoch
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        sizes, names = (world // expert_parallel, expert_parallel), ("fsdp" if fsdp else "dp", "ep")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        # what other devices hold never comes to this one
        return parallelize(model, mesh, **options).to(device)

    model = model.to(device)
    same_values(model, every_rank())
    if fsdp:
        mesh = init_device_mesh(device.type, (world,))
        for module in (*blocks(model), model):
            fully_shard(module, mesh=mesh, **options)
    return model


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
