"""One model trained by several processes: what it is before the first step, and what becomes of its
gradients.

Data parallel without the wrapper DistributedDataParallel: a step may hold several backward passes,
some of them for a part of the weights, and its gradients are averaged once, before the optimizer's
step. FSDP2 averages the gradients itself, in each backward pass. With one process each function
does what a program without ``torch.distributed`` would do.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ironmoe.moe.sharded import is_sharded

T = TypeVar("T")


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
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
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
    """1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_number() -> int:
    """From 0; 0 where ``torch.distributed`` is not initialised."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the processes. Each process must call it once a step,
    after its backward passes, with its gradients of the mean loss of its own parts.

    A parameter that has a gradient in some processes only has 0 in the others; one without a
    gradient anywhere keeps none. The host waits for the device once, to learn which these are.
    Under FSDP2, which has averaged them already, the gradients stay as they are.

    The running statistics of batch norm are averaged, too: each process has seen its own parts.
    """
    if number_of_processes() == 1:
        return
    _average([buffer for name, buffer in model.named_buffers() if _is_running_statistic(name)])
    if is_sharded(model):
        return

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return
    has_gradient = torch.tensor([float(p.grad is not None) for p in trained])
    used = mean_over_processes(has_gradient.to(trained[0].device)).tolist()
    gradients = []
    for parameter, share in zip(trained, used, strict=True):
        if share:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    _average(gradients)


def _is_running_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _average(tensors: list[Tensor]) -> None:
    """Replace the tensors by their means over the processes, in one exchange for each dtype."""
    tensors = sorted(tensors, key=lambda tensor: str(tensor.dtype))
    for _, same in groupby(tensors, key=lambda tensor: tensor.dtype):
        alike = list(same)
        mean = torch.cat([tensor.flatten() for tensor in alike]) / number_of_processes()
        dist.all_reduce(mean)
        pieces = mean.split([tensor.numel() for tensor in alike])
        for tensor, piece in zip(alike, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


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


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float) -> Tensor:
    """Scale the gradients so that their L2 norm, of all together, is at most ``norm``. Under FSDP2
    it is that of the whole gradients, of which this process has a part.

    The norm is summed in float64: its float32 value, by which gradients are scaled, then does not
    depend on how they are shared out, and FSDP2 trains to the bits of data parallel.

    Returns:
        () float64, the norm before; the same in every process.
    """
    given = [p.grad for p in model.parameters() if p.grad is not None]
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in given]
    if not own:
        return torch.zeros((), dtype=torch.float64)

    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in own]
    square = torch.stack(norms).square().sum()
    if is_sharded(model):
        dist.all_reduce(square)
    total = square.sqrt()

    factor = (norm / (total + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for grad in own:
        grad.mul_(factor.to(grad.dtype))
    return total
