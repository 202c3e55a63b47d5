"""The register of attacks: each class is registered where it is defined, with what others need to
know of it.

From here follow the names, options, help and error texts of ``ironmoe attack``, the table of
attacks in docs/attacks.md, and the tests that every attack must pass. Nothing here knows an attack
by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from ironmoe.attacks.attack import Attack

AnyAttack = TypeVar("AnyAttack", bound=type[Attack])


class RegisteredAttack(NamedTuple):
    """A class of attacks.

    kind:    the class
    summary: what it does, in one sentence, for help and docs
    source:  where it was published
    takes:   the options of the command line that its constructor takes beyond those of ``Attack``
    names:   its names on the command line, each with the constructor's arguments that it stands
             for; they give way to what the user asks for
    """

    kind: type[Attack]
    summary: str
    source: str
    takes: tuple[str, ...]
    names: Mapping[str, Mapping[str, Any]]


class NamedAttack(NamedTuple):
    """An attack of the command line: a registered class with the arguments that its name stands
    for."""

    kind: type[Attack]
    takes: tuple[str, ...]
    settings: Mapping[str, Any]


ATTACKS: dict[str, RegisteredAttack] = {}
"""class name → entry, in the order of registration."""


def register_attack(
    *,
    summary: str,
    source: str,
    takes: tuple[str, ...] = (),
    names: Mapping[str, Mapping[str, Any]],
) -> Callable[[AnyAttack], AnyAttack]:
    """A class decorator that registers an attack; the arguments are those of
    ``RegisteredAttack``. A class that is defined again, as in a notebook, takes the place of the
    former one.

    Raises:
        TypeError: the class does not derive from ``Attack``, or an argument has another type.
        ValueError: another attack has one of these names, or a name has a comma in it.
    """
    if not isinstance(names, Mapping):
        raise TypeError(f"names must be a mapping, name → settings, got {names!r}")
    if isinstance(takes, str) or not all(isinstance(option, str) for option in takes):
        raise TypeError(f"takes must be a tuple of options, got {takes!r}")
    with_comma = [name for name in names if "," in name]
    if with_comma:
        raise ValueError(f"names must have no comma, got {with_comma[0]!r}")

    def register(kind: AnyAttack) -> AnyAttack:
        if not (isinstance(kind, type) and issubclass(kind, Attack)):
            raise TypeError(f"a registered attack must be a class of Attack, got {kind!r}")
        others = [entry for entry in ATTACKS.values() if not _is_same(entry.kind, kind)]
        known = {name for entry in others for name in (entry.kind.__name__, *entry.names)}
        taken = sorted(known & {kind.__name__, *names})
        if taken:
            raise ValueError(f"names of {kind.__name__} must be new, got {', '.join(taken)}")
        ATTACKS[kind.__name__] = RegisteredAttack(kind, summary, source, takes, names)
        return kind

    return register


def arrange(*kinds: type[Attack]) -> None:
    """List these classes first, in this order, whatever the order in which files import each
    other."""
    entries = dict(ATTACKS)
    ATTACKS.clear()
    for name in (*(kind.__name__ for kind in kinds), *entries):
        ATTACKS[name] = entries[name]


def _is_same(one: type, other: type) -> bool:
    """Whether two classes are the same lines of code, run once or twice."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def named_attacks() -> dict[str, NamedAttack]:
    """name → attack, for every name of the command line, in the order of registration."""
    return {
        name: NamedAttack(entry.kind, entry.takes, settings)
        for entry in ATTACKS.values()
        for name, settings in entry.names.items()
    }
