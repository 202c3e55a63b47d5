"""A recipe says which MLPs of a dense model became experts, and with which options, as JSON can
hold it.

{"format": 1, "steps": [{"mlps": ["blocks.1.mlp"], "router": {…}, "moe": {…}, "noise": 0.0}]}
"""

import numbers
from collections.abc import Mapping
from typing import Any

import torch

from ironmoe.kernels import ExpertGroups
from ironmoe.moe.routers.capacity import Capacity

FORMAT = 1
# How a recipe is called in the metadata of a safetensors file and in a config.json.
KEY = "ironmoe_upcycling"
Recipe = dict[str, Any]
_STEP = ("mlps", "moe", "noise", "router")
_CAPACITY = (
    "factor",
    "images_per_group",
    "tokens_per_group",
    "priority",
    "multiple_of",
    "places",
    "renormalize",
)


def encoded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a router or a layer as JSON can hold them.

    Raises:
        TypeError: an option is neither a number, a string, None, a dtype, a ``Capacity`` nor an
            ``ExpertGroups``.
    """
    return {name: _encoded(name, value) for name, value in options.items()}


def decoded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``encoded``. ValueError if a value is none that it writes."""
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


def _encoded(name: str, value: Any) -> Any:
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
