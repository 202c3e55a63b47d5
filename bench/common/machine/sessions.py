"""The calls of a command that measured something for one run: where and with what each did."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Origin = dict[str, Any]  # as ``provenance`` returns it

MACHINE = ("processor", "instructions", "cores", "threads", "gpus")
CODE = ("ironmoe", "commit")


def changes(before: Origin, now: Origin) -> list[str]:
    """What differs between two calls and can change a number, such as "threads 1, then 2"."""
    pairs = [(name, before["machine"][name], now["machine"][name]) for name in MACHINE]
    pairs += [(name, before[name], now[name]) for name in CODE]
    packages = {**before["versions"], **now["versions"]}
    pairs += [
        (name, before["versions"].get(name), now["versions"].get(name))
        for name in packages
        if name not in CODE
    ]
    return [f"{name} {_text(old)}, then {_text(new)}" for name, old, new in pairs if old != new]


def mixed(sessions: Sequence[Origin]) -> str:
    """A sentence for a run whose parts were measured under different conditions; empty for
    others."""
    differing = [change for before, now in pairwise(sessions) for change in changes(before, now)]
    if not differing:
        return ""
    listed = "; ".join(dict.fromkeys(differing))
    return f"Parts of this run were measured under different conditions: {listed}."


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
