"""The state of a training as whole tensors on the CPU, whatever number of processes trains, sharded
or not: a training that one process began goes on in several, and back.

Process 0 has the state. The others have none: they get an empty one, and give an empty one back.
Every process must call each of these functions.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

from ironmoe.attacks.training import EMA
from ironmoe.bench.train.state import Numbers, Tensors, parted
from ironmoe.moe.parallel.optimizer_state import optimizer_parameters
from ironmoe.moe.parallel.together import number_of_processes, process_number
from ironmoe.moe.sharded import whole_tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, by the names that they have without ``torch.compile``
    and activation checkpointing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return full_tensors(cast("dict[str, Tensor]", state))


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set what ``full_state`` gave.

    Raises:
        RuntimeError: the state is that of another model.
    """
    several = number_of_processes() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    set_model_state_dict(model, dict(state), options=options)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors by the same names, such as those of an average of the weights. A sharded
    one is gathered."""
    state = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if process_number() == 0:
            state[name] = whole.cpu().clone(memory_format=torch.contiguous_format)
    return state


def load_full_tensors(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Set the tensors to what ``full_tensors`` gave."""
    for name, tensor in tensors.items():
        own = tensor.detach()
        own.copy_(_from_first(state.get(name), tuple(own.shape), own.dtype, own))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, such as "head.weight/exp_avg". Rates and other
    options of its groups are not in it.
    """
    return full_tensors(
        {
            f"{name}/{key}": torch.as_tensor(value)
            for name, parameter in optimizer_parameters(model, optimizer).items()
            for key, value in optimizer.state.get(parameter, {}).items()
            if value is not None
        }
    )


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Set what ``optimizer_state`` gave; parameters that are not in it keep no state.

    Raises:
        ValueError: the state has a parameter that the optimizer has not.
    """
    entries = _object_of_first([_entry(name, tensor) for name, tensor in state.items()])
    parameters = optimizer_parameters(model, optimizer)
    foreign = sorted({entry.parameter for entry in entries} - parameters.keys())
    if foreign:
        raise ValueError(
            f"state must be of the optimizer's parameters, got {foreign[0]!r}, which is none of "
            f"its {len(parameters)}"
        )

    loaded: dict[nn.Parameter, dict[str, Tensor]] = {}
    for entry in entries:
        parameter = parameters[entry.parameter]
        value = state.get(f"{entry.parameter}/{entry.key}")
        own = loaded.setdefault(parameter, {})
        own[entry.key] = _from_first(value, entry.shape, entry.dtype, parameter.detach())

    groups = optimizer.state_dict()["param_groups"]
    of_number = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = {i: loaded[p] for i, p in enumerate(of_number) if p in loaded}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def averaged_state(average: EMA) -> tuple[Tensors, Numbers]:
    """(copies of the averages in the first process, the numbers). Every process must call it."""
    tensors, numbers = parted(average.state_dict())
    return full_tensors(tensors), numbers


def load_averaged_state(average: EMA, tensors: Tensors, numbers: Numbers) -> None:
    """Set what ``averaged_state`` gave. Every process must call it."""
    own, _ = parted(average.state_dict())  # sharded as the averages are
    load_full_tensors(own, tensors)
    average.load_state_dict(own | numbers)


class _Entry(NamedTuple):
    """One tensor of an optimizer's state, without its values."""

    parameter: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _entry(name: str, tensor: Tensor) -> _Entry:
    parameter, _, key = name.rpartition("/")
    return _Entry(parameter, key, tuple(tensor.shape), tensor.dtype)


def _object_of_first(value: list[_Entry]) -> list[_Entry]:
    """What process 0 gives, in every process."""
    if number_of_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _from_first(
    value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    """The tensor of process 0, where ``like`` lies: sharded as ``like`` is if it has its shape."""
    whole = torch.empty(shape, dtype=dtype) if value is None else value
    if number_of_processes() == 1:
        return whole
    sent = whole.to(like.device, copy=True)
    dist.broadcast(sent, src=0)
    if isinstance(like, DTensor) and like.shape == whole.shape:
        # not by distribute_tensor, which does not know how FSDP2 shards what is sharded already
        mesh = like.device_mesh
        copies = DTensor.from_local(sent, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return copies.redistribute(placements=like.placements)
    return sent
