"""What a class of attacks writes down about arguments that other libraries give it.

``aliases`` of a class maps the foreign name to one of three things: the name that the argument has
here; ``Turned``, if its value has to change as well; ``Only``, if some values ask for what happens
here anyway, and all others for what does not. A class inherits the aliases of its bases.

The names are those of fra31/auto-attack and torchattacks 3.5, and of the authors' own code for
DeepFool (LTS4/DeepFool), CW (carlini/nn_robust_attacks) and HopSkipJump (Jianbo-Lab/HSJA).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Turned:
    """An argument that has another name and another value here.

    into: the name here
    how: makes the value here of the foreign one; ValueError says what is allowed
    example: a foreign value, which documentation shows and tests try
    """

    into: str
    how: Callable[[Any], Any]
    example: Any


@dataclass(frozen=True)
class Only:
    """An argument that changes nothing here: some values are taken, and others are refused.

    values: those that are taken
    instead: what to do about another one, as a sentence without its full stop
    """

    values: tuple[Any, ...]
    instead: str

    @property
    def allowed(self) -> str:
        """The values that are taken, in words."""
        if len(self.values) > 2:
            return f"one of {self.values}"
        return " or ".join(map(repr, self.values)) or "left out"

    def takes(self, value: Any) -> bool:
        """Whether the value asks for what is done anyway; 0 does not pass for False."""
        if getattr(value, "shape", ()) != ():  # a comparison would be one of elements
            return False
        alike = [isinstance(value, bool) == isinstance(known, bool) for known in self.values]
        return any(same and value == known for same, known in zip(alike, self.values, strict=True))


Alias = str | Turned | Only
Aliases = Mapping[str, Alias]


def declare(**aliases: Alias) -> Aliases:
    """Foreign name → what it stands for, to be written down in a class; nobody can change it."""
    return MappingProxyType(aliases)
