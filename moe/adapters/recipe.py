"""A recipe says which MLPs of a dense model became experts, and with which options, as JSON can
hold it.

{"format": 1, "steps": [{"mlps": ["blocks.1.mlp"], "router": {…}, "moe": {…}, "noise": 0.0}]}
"""

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from ironmoe.kernels import ExpertGroups
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.capacity import Capacity
from ironmoe.moe.routers.top_k import TopKRouter
from ironmoe.moe.routers.wrapped import unwrapped

FORMAT = 1
# How a recipe is called in the metadata of a safetensors file and in a config.json.
KEY = "ironmoe_upcycling"
Recipe = dict[str, Any]
_STEP = ("mlps", "moe", "noise", "router")
# A router and a capacity have an attribute for each argument.
_ROUTER, _CAPACITY = (
    [name for name in inspect.signature(cls).parameters if name not in ("dim", "device", "dtype")]
    for cls in (TopKRouter, Capacity)
)


def router_of(moe: MoE) -> dict[str, Any]:
    """The keyword arguments that make the layer's router as it is now, as JSON can hold them.

    Raises:
        TypeError: it is no ``TopKRouter``, or has an option that a recipe cannot hold.
    """
    router = unwrapped(moe.router)
    if type(router) is not TopKRouter:
        raise TypeError(
            "router must be a TopKRouter, so that a recipe of the model can hold it, got a "
            f"{type(router).__name__}"
        )
    options = {name: getattr(router, name) for name in _ROUTER}
    for name in ("bias", "selection_bias"):
        options[name] = options[name] is not None
    return _encoded(options)


def layer_of(moe: MoE) -> dict[str, Any]:
    """The same of the layer. TypeError if a recipe cannot hold one of them."""
    capacity = None if moe.capacity is None else unwrapped(moe.capacity)
    return _encoded(
        {
            "capacity": capacity,
            "shared_dim": 0 if moe.shared is None else moe.shared.fc2.in_features,
            "shared_gate": moe.shared_gate is not None,
            "recompute": moe.recompute,
            "precision": moe.precision,
            "dispatch_dtype": moe.dispatch_dtype,
        }
    )


def decoded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe as arguments. ValueError if a value is none that a recipe has."""
    return {name: _decoded(name, value) for name, value in options.items()}


def steps_of(recipe: Any) -> list[dict[str, Any]]:
    """The steps of a recipe.

    Raises:
        ValueError: it is no recipe, or one in a format that this version does not know.
    """
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("format"), int):
        raise ValueError(f"recipe must be a dict with a format and steps, got {recipe!r}")
    if recipe["format"] != FORMAT:
        raise ValueError(
            f"recipe must have format {FORMAT}, which this version of ironmoe reads, got format "
            f"{recipe['format']}: a newer ironmoe may read it"
        )
    steps = recipe.get("steps")
    if set(recipe) != {"format", "steps"} or not isinstance(steps, list) or not steps:
        raise ValueError(f"recipe must have a format and steps and nothing else, got {recipe!r}")
    for step in steps:
        if not isinstance(step, Mapping) or sorted(step) != list(_STEP):
            raise ValueError(f"a step of a recipe must have {', '.join(_STEP)}, got {step!r}")
    return steps


def _encoded(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _encoded_value(name, value) for name, value in options.items()}


def _encoded_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, ExpertGroups):
        return {"ExpertGroups": value._asdict()}
    if type(value) is Capacity:
        return {"Capacity": {field: getattr(value, field) for field in _CAPACITY}}
    raise TypeError(
        f"{name} must be a number, a string, None, a dtype, a Capacity or ExpertGroups, so that a "
        f"recipe of the model can hold it, got {value!r}"
    )


def _decoded(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "dtype" and isinstance(getattr(torch, str(content), None), torch.dtype):
            return getattr(torch, content)
        if kind == "ExpertGroups":
            return ExpertGroups(**content)
        if kind == "Capacity":
            return Capacity(**content)
    raise ValueError(
        f"{name} in a recipe must be a number, a string, None, a dtype, a Capacity or "
        f"ExpertGroups, got {value!r}"
    )
