"""What an optimizer keeps, by the names of the parameters: tensors, and what JSON can hold.

torch's ``get_optimizer_state_dict`` is not used: loaded into a new optimizer, it makes a state for
parameters that had none, as if they had made a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.moe.checkpoints.errors import CheckpointError, require
from ironmoe.moe.routers.wrapped import plain_name

_PLAIN = (bool, int, float, str, type(None))


def optimizer_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the plain model.

    Raises:
        ValueError: it has one that is none of the model.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    found = {}
    for name, parameter in inner.named_parameters():
        if parameter in own:
            found[plain_name(name)] = parameter
    if len(found) < len(own):
        raise ValueError(
            f"optimizer must have parameters of the model alone, got {len(own) - len(found)} others"
        )
    return found


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that the optimizer keeps, such as "head.weight/exp_avg"."""
    tensors = {}
    for name, parameter in optimizer_parameters(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                _require_alike(value, parameter, f"{name}/{key}")
                tensors[f"{name}/{key}"] = value.detach()
    return tensors


def optimizer_options(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What else the optimizer keeps: the options of its groups, by the names of their parameters,
    and numbers of single parameters, such as {"head.weight": {"step": 3}}."""
    names = {parameter: name for name, parameter in optimizer_parameters(model, optimizer).items()}
    groups = [
        {
            "parameters": [names[parameter] for parameter in group["params"]],
            "options": {key: _plain(value, key) for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]
    numbers = {
        name: {
            key: _plain(value, f"{name}/{key}")
            for key, value in optimizer.state.get(parameter, {}).items()
            if not isinstance(value, Tensor)
        }
        for parameter, name in names.items()
    }
    return {
        "defaults": sorted(optimizer.defaults),
        "groups": groups,
        "numbers": {name: of_one for name, of_one in numbers.items() if of_one},
    }


def require_same_optimizer(own: Mapping[str, Any], saved: Mapping[str, Any], where: object) -> None:
    """CheckpointError unless what ``optimizer_options`` gave of two optimizers lets the one take
    the state of the other."""
    foreign = sorted(set(saved["defaults"]) - set(own["defaults"]))
    missing = sorted(set(own["defaults"]) - set(saved["defaults"]))
    if foreign or missing:
        raise CheckpointError(
            f"{where}: found another optimizer; {', '.join(foreign) or 'none of its'} are not "
            f"options of yours, {', '.join(missing) or 'none of yours'} not of the saved one"
        )

    groups = [sorted(group["parameters"]) for group in saved["groups"]]
    own_groups = [sorted(group["parameters"]) for group in own["groups"]]
    count = f"{len(groups)} groups of parameters in the optimizer"
    require(len(groups) == len(own_groups), where, count, f"{len(own_groups)}")
    for number, (group, own_group) in enumerate(zip(groups, own_groups, strict=True)):
        differing = sorted(set(group) ^ set(own_group))
        words = f"group {number} of the optimizer with the parameters of your optimizer"
        require(not differing, where, f"other parameters: {differing[:5]}", words)


def empty_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, Tensor]:
    """Tensors without values for what ``optimizer_tensors`` gave, of which ``saved`` has dtypes and
    shapes: sharded as the parameters are."""
    parameters = optimizer_parameters(model, optimizer)
    tensors = {}
    for path, (dtype, shape) in saved.items():
        parameter = parameters[path.rpartition("/")[0]].detach()
        if shape == tuple(parameter.shape):
            tensors[path] = torch.empty_like(parameter, dtype=dtype)
        else:
            tensors[path] = torch.empty(shape, dtype=dtype)
    return tensors


def set_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """Set what ``optimizer_tensors`` and ``optimizer_options`` gave. A parameter that had no state
    has none afterwards."""
    state: dict[str, dict[str, Any]] = {name: dict(n) for name, n in options["numbers"].items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = tensor

    group_of = {frozenset(group["parameters"]): group["options"] for group in options["groups"]}
    names = {parameter: name for name, parameter in optimizer_parameters(model, optimizer).items()}
    loaded = optimizer.state_dict()
    numbered: dict[int, dict[str, Any]] = {}
    for group, own in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
        in_group = [names[parameter] for parameter in own["params"]]
        for key, value in group_of[frozenset(in_group)].items():
            group[key] = _like(value, own.get(key))
        numbered |= {
            i: state[name]
            for i, name in zip(group["params"], in_group, strict=True)
            if name in state
        }
    optimizer.load_state_dict({"state": numbered, "param_groups": loaded["param_groups"]})


def _require_alike(value: Tensor, parameter: Tensor, path: str) -> None:
    """How a part of another shape is sharded could not be told when it is loaded."""
    if hasattr(value, "device_mesh") and value.shape != parameter.shape:
        raise ValueError(
            "optimizer must keep sharded tensors in the shapes of their parameters, got "
            f"{path} of shape {tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
        )


def _plain(value: Any, name: str) -> Any:
    """A number or text, or several, as JSON can hold them; a tensor with one element is a
    number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(one, name) for one in value]
    if not isinstance(value, _PLAIN):
        raise TypeError(
            f"optimizer must keep tensors, numbers and texts, got {type(value).__name__} as {name}"
        )
    return value


def _like(value: Any, own: Any) -> Any:
    """A loaded option in the type that this optimizer has."""
    if isinstance(own, Tensor):
        return torch.full_like(own, value)
    return tuple(value) if isinstance(value, list) else value
