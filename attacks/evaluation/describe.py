"""Attacks as plain values: what must be the same for two runs to be one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.evaluation.checksum import checksum


def describe_attack(attack: Attack) -> Any:
    """Every setting of an attack, and of the attacks it runs, as JSON values. A callable is told by
    its name alone, so two lambdas of one function are the same here."""
    return [_plain(stage) for stage in attack.stages]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Tensor):
        return [list(value.shape), checksum(value)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    kind = type(value) if not hasattr(value, "__qualname__") else value
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind is value or isinstance(value, nn.Module):
        return name
    known = getattr(value, "settings", None) or getattr(value, "__dict__", None)
    if known is None:
        return repr(value)
    return {"kind": name} | {
        key: _plain(item) for key, item in sorted(known.items()) if not key.startswith("_")
    }
