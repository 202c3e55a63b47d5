"""Attacks as plain values: what must be the same for two evaluations to be one.

The description names what a user chose and nothing else, so that a journal still opens after the
library has renamed or moved its own parts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.evaluation.checksum import checksum

FOLLOWS_FROM_MODEL = frozenset({"attacked_model", "coupled_by_model"})
FOLLOWS_FROM_SETTINGS = frozenset({"exhaustive", "inside", "keeps", "max_queries", "starts_clean"})
"""Attributes that an attack of this library derives from its constructor's arguments. In an attack
of a user they count like every public attribute, since no one else knows what they follow from."""


def describe_attack(attack: Attack) -> Any:
    """Every setting of an attack, and of the attacks it runs, as JSON values. A callable is told by
    its name alone, so two lambdas of one function are the same here."""
    return [_attack(stage) for stage in attack.stages]


def public_name(module: str, name: str) -> str:
    """A class or function by the name that a user knows: "ironmoe.attacks.PGD", whatever file of
    the library it is in; for others the module and the name."""
    parts = module.split(".")
    floor = parts[:2] if parts[0] == "ironmoe" else parts
    return ".".join([*floor, name])


def _attack(attack: Attack) -> dict[str, Any]:
    """One attack. How the model is called stands apart, since an attack of a user may have
    attributes of the same names."""
    kind = type(attack)
    return {
        "kind": public_name(kind.__module__, kind.__qualname__),
        "settings": _plain(_settings(attack)),
        "model_call": _plain(attack.attacked_model.settings),
    }


def _settings(attack: Attack) -> dict[str, Any]:
    """What the user chose, without what follows from it."""
    in_library = type(attack).__module__.startswith("ironmoe.attacks.")
    left_out = FOLLOWS_FROM_MODEL | (FOLLOWS_FROM_SETTINGS if in_library else frozenset())
    chosen = attack.chosen_settings()
    return {name: value for name, value in chosen.items() if name not in left_out}


def _described(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _plain(value) for name, value in sorted(settings.items())}
    return {"kind": public_name(kind.__module__, kind.__qualname__)} | values


def _plain(value: Any) -> Any:
    """A setting as a JSON value."""
    if value is None or isinstance(value, bool | int | float | str):
        return value

    if isinstance(value, torch.dtype | torch.device):
        return str(value)

    if isinstance(value, Tensor):
        return [list(value.shape), checksum(value)]

    if isinstance(value, Attack):
        return _attack(value)

    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]

    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}

    if isinstance(value, partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]

    if hasattr(value, "__qualname__"):  # a class or a function
        return public_name(value.__module__, value.__qualname__)

    kind = type(value)
    if isinstance(value, nn.Module):
        return public_name(kind.__module__, kind.__qualname__)

    known = getattr(value, "settings", None) or getattr(value, "__dict__", None)
    if known is None:
        return repr(value)
    return _described(kind, {name: known[name] for name in known if not name.startswith("_")})


def differences(there: Any, now: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, down to the entry that does: "attacks.steps: 40 there, 20
    now"."""
    if _are_alike_lists(there, now):
        there, now = dict(enumerate(there)), dict(enumerate(now))
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return [] if there == now else [f"{name}: {there!r} there, {now!r} now"]

    inner = f"{name}." if name else ""
    return [
        line
        for key in sorted({*there, *now})
        for line in differences(there.get(key), now.get(key), f"{inner}{key}")
    ]


def _are_alike_lists(there: Any, now: Any) -> bool:
    """Lists of as many entries, which have names for what is in them."""
    both = (there, now)
    return (
        all(isinstance(entries, list) for entries in both)
        and len(there) == len(now)
        and all(isinstance(entry, dict) for entries in both for entry in entries)
    )
