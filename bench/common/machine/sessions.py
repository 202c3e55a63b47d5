"""The calls of a command that measured something for one run: where and with what each did."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ironmoe.bench.common.machine.origin import origin


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the ``provenance`` of two calls and can change a number, such as
    "machine.threads: 1 there, 2 now"."""
    # It comes with torch, which --help does without.
    from ironmoe.attacks.evaluation.describe import differences

    return differences(origin(before), origin(now))


def mixed(sessions: Sequence[dict[str, Any]]) -> str:
    """A sentence for a run whose parts were measured under different conditions; empty for
    others."""
    differing = [change for before, now in pairwise(sessions) for change in changes(before, now)]
    if not differing:
        return ""
    listed = "; ".join(dict.fromkeys(differing))
    return f"Parts of this run were measured under different conditions, call by call: {listed}."
