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
    attacks = settings.get("attacks")
    if not isinstance(attacks, dict):
        return settings
    described = {name: [_attack(stage) for stage in stages] for name, stages in attacks.items()}
    return settings | {"attacks": described}


def _attack(old: dict[str, Any]) -> dict[str, Any]:
    """One attack. What follows from the model or from other settings is left out."""
    attacked_model = {name: value for name, value in old["victim"].items() if name != "kind"}
    known = {
        name: value for name, value in old.items() if name not in ("coupled", "joint", "victim")
    }
    new = known | attacked_model

    if "queries" in new:
        new["max_queries"] = new.pop("queries")
    if str(old["kind"]).startswith("ironmoe."):
        new = {name: value for name, value in new.items() if name not in FOLLOWS_FROM_SETTINGS}

    new = _apgd(new) if _is_apgd(old) else _pgd(new)
    return {name: _renamed(value) for name, value in new.items()}


def _is_apgd(old: dict[str, Any]) -> bool:
    schedule = old.get("schedule")
    return isinstance(schedule, dict) and str(schedule["kind"]).startswith("ironmoe.attacks.apgd")


def _apgd(new: dict[str, Any]) -> dict[str, Any]:
    """APGD kept some of its arguments in its schedule, and its loss under three names."""
    hidden = ("schedule", "loss_name", "loss_of", "targeted_loss_of")
    schedule = new["schedule"]
    chosen = {name: value for name, value in new.items() if name not in hidden}
    chosen["loss"] = new["targeted_loss_of"] or new["loss_of"]
    chosen["three_radii"] = schedule.get("three_radii", False)
    if "rho" in schedule:
        chosen["rho"] = schedule["rho"]
    return chosen


def _pgd(new: dict[str, Any]) -> dict[str, Any]:
    """PGD, its relatives and PGD.vmoe; an attack of a user may call anything ``loss_of``."""
    is_pgd = {"alpha", "random_start", "early_stop"} <= new.keys()
    is_vmoe = "auxiliary_loss" in new
    if "loss_of" in new and (is_pgd or is_vmoe):
        new = dict(new)
        new["loss"] = new.pop("loss_of")
    return new


def _renamed(value: Any) -> Any:
    """The value, in which classes and functions of the library have their public names."""
    if isinstance(value, str):
        match = OLD_NAME.fullmatch(value)
        return f"{match[1]}.{match[2]}" if match else value
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if isinstance(value, dict):
        return {name: _renamed(item) for name, item in value.items()}
    return value
