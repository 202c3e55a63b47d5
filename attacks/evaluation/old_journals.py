"""The settings of a journal without a format number, in the words of today's.

Such journals name classes by the file they were in, and list every attribute of an attack under the
names of that time. Files and attributes have moved since; what the user chose is still all there.
"""

import re
from typing import Any

from ironmoe.attacks.evaluation.describe import FOLLOWS_FROM_SETTINGS

# A library name with the file it was in: only the rooms called gpu had files of their own.
OLD_NAME = re.compile(r"(ironmoe\.\w+)\.(?:gpu\.)?[a-z_0-9]+\.([A-Za-z_<][\w.<>]*)")


def translated(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of an old journal as today's code would write them."""
    if not isinstance(settings.get("attacks"), dict):
        return settings
    return settings | {"attacks": _value(settings["attacks"])}


def _value(old: Any) -> Any:
    """A value, in which classes and functions of the library have their public names."""
    if isinstance(old, str):
        match = OLD_NAME.fullmatch(old)
        return f"{match[1]}.{match[2]}" if match else old
    if isinstance(old, list):
        return [_value(item) for item in old]
    if isinstance(old, dict):
        is_attack = {"kind", "victim"} <= old.keys() and isinstance(old["victim"], dict)
        return _attack(old) if is_attack else {name: _value(item) for name, item in old.items()}
    return old


def _attack(old: dict[str, Any]) -> dict[str, Any]:
    """One attack. What follows from the model or from other settings is left out."""
    apart = ("coupled", "joint", "kind", "victim")
    known = {name: value for name, value in old.items() if name not in apart}
    if "queries" in known:
        known["max_queries"] = known.pop("queries")
    if "loss_of" in known:
        known["loss"] = known.pop("loss_of")
    if _is_apgd(old):
        known = _apgd(known)
    if str(old["kind"]).startswith("ironmoe."):
        known = {name: value for name, value in known.items() if name not in FOLLOWS_FROM_SETTINGS}

    model_call = {name: value for name, value in old["victim"].items() if name != "kind"}
    return {
        "kind": _value(old["kind"]),
        "settings": _value(known),
        "model_call": _value(model_call),
    }


def _is_apgd(old: dict[str, Any]) -> bool:
    schedule = old.get("schedule")
    kind = schedule.get("kind") if isinstance(schedule, dict) else None
    return str(kind).startswith("ironmoe.attacks.apgd")


def _apgd(known: dict[str, Any]) -> dict[str, Any]:
    """APGD kept some of its arguments in its schedule, and its loss under three names."""
    schedule = known["schedule"]
    hidden = ("schedule", "loss_name", "targeted_loss_of")
    chosen = {name: value for name, value in known.items() if name not in hidden}
    chosen["loss"] = known["targeted_loss_of"] or known["loss"]
    chosen["three_radii"] = schedule.get("three_radii", False)
    chosen["early_stop"] = known["keeps"] == "first"
    if "rho" in schedule:
        chosen["rho"] = schedule["rho"]
    return chosen
