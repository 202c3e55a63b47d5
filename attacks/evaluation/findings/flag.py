"""What one check against false security says: it passed, it tripped, or it was not looked at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PASSED, TRIPPED, NOT_LOOKED_AT = STATES = ("passed", "tripped", "not looked at")


class Flag(NamedTuple):
    """What one check says: its name, whether it tripped, the number that this rests on, and what it
    means in plain words.

    looked_at: False if the check could not be made. Then it has neither passed nor tripped, its
        value means nothing, and the message says why.
    """

    name: str
    tripped: bool
    value: float
    message: str
    looked_at: bool = True

    @classmethod
    def not_looked_at(cls, name: str, why: str) -> "Flag":
        """Of a check that could not be made; ``why`` is a clause without a full stop."""
        return cls(name, False, 0.0, f"Not looked at: {why}.", looked_at=False)

    @property
    def state(self) -> str:
        """ "passed", "tripped" or "not looked at"."""
        if not self.looked_at:
            return NOT_LOOKED_AT
        return TRIPPED if self.tripped else PASSED

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: "name", "state", "tripped", "value" (None if it was not looked at) and
        "message"."""
        return {
            "name": self.name,
            "state": self.state,
            "tripped": self.tripped,
            "value": self.value if self.looked_at else None,
            "message": self.message,
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> "Flag":
        """The flag that ``as_dict`` wrote; one of an earlier version has no "state"."""
        value = written["value"]
        return cls(
            name=written["name"],
            tripped=bool(written["tripped"]),
            value=math.nan if value is None else float(value),
            message=written["message"],
            looked_at=written.get("state") != NOT_LOOKED_AT,
        )


def in_state(flags: Sequence[Flag], state: str) -> list[Flag]:
    """Those of the flags that are in one of ``STATES``."""
    return [flag for flag in flags if flag.state == state]


def combined(of_replicas: Sequence[Sequence[Flag]]) -> list[Flag]:
    """What several replicas say together, each of which looked at images of its own: a check trips
    if it trips in one, else it passes if one could make it. A replica without images says
    nothing."""
    weight = {NOT_LOOKED_AT: 0, PASSED: 1, TRIPPED: 2}
    found: dict[str, Flag] = {}
    for flag in (flag for flags in of_replicas for flag in flags):
        known = found.get(flag.name)
        if known is None or weight[flag.state] > weight[known.state]:
            found[flag.name] = flag
    return list(found.values())


def counted_states(flags: Sequence[Flag]) -> str:
    """Such as "1 of 13 checks tripped, 10 passed, 2 were not looked at"."""
    if not flags:
        return "checks against false security were not made"
    tripped, passed, unseen = (
        len(in_state(flags, state)) for state in (TRIPPED, PASSED, NOT_LOOKED_AT)
    )
    were = "was" if unseen == 1 else "were"
    text = f"{tripped} of {len(flags)} checks tripped, {passed} passed"
    return f"{text}, {unseen} {were} not looked at" if unseen else text
