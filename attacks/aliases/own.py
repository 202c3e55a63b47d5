"""Which arguments the constructor of a class takes by its own names."""

import functools
import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args

from ironmoe.attacks.aliases.declared import Alias, Aliases, Only
from ironmoe.attacks.balls.ball import NORMS, norm_named

KEPT = 1024
"""So many answers about classes are kept: reading a signature takes longer than the rest."""

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def declared_in(kind: type) -> Aliases:
    """The aliases that this very class writes down, without those of its bases."""
    return vars(kind).get("aliases", {})


@functools.lru_cache(KEPT)
def own_arguments(kind: type) -> tuple[str, ...]:
    """The names by which a class takes what it has, in its order: those of its constructor and,
    where that hands further ones on, of the constructors of its bases. A class that writes one of
    its bases' names down as ``Only`` does not take it."""
    names: list[str] = []
    closed: set[str] = set()
    hands_on = True
    for base in kind.__mro__[:-1]:
        if hands_on and "__init__" in vars(base):
            parameters = _parameters(base)
            names += [name for name in parameters if name not in names and name not in closed]
            hands_on = any(p.kind is p.VAR_KEYWORD for p in _all_parameters(base))
        closed |= {name for name, alias in declared_in(base).items() if isinstance(alias, Only)}
    return tuple(name for name in names if name != "model")


@functools.lru_cache(KEPT)
def alias_of(kind: type, name: str) -> Alias | None:
    """What a name stands for in calls of a class; None: it is its own, or not known."""
    for base in kind.__mro__[:-1]:
        if "__init__" in vars(base) and name in _parameters(base):
            return None
        if name in declared_in(base):
            return declared_in(base)[name]
    return None


def aliases_of(kind: type) -> dict[str, Alias]:
    """Every foreign name that a class takes, the nearest class first."""
    own = own_arguments(kind)
    names = dict.fromkeys(name for base in kind.__mro__[:-1] for name in declared_in(base))
    found = {name: alias_of(kind, name) for name in names}
    return {
        name: alias
        for name, alias in found.items()
        if isinstance(alias, Only) or (alias is not None and _target(alias) in own)
    }


def known_arguments(kind: type) -> str:
    """All that a class takes, in words for an error."""
    renamed = {
        name: _target(alias)
        for name, alias in aliases_of(kind).items()
        if not isinstance(alias, Only)
    }
    foreign = ", ".join(f"{name} ({own})" for name, own in renamed.items())
    return f"{', '.join(own_arguments(kind))}, or, under other libraries' names, {foreign}"


def names_by_position(kind: type) -> list[str]:
    """The arguments that the constructor of a class takes by position, in their order, as far as
    they have names there."""
    return [p.name for p in _parameters(kind).values() if p.kind in BY_POSITION]


def check_positions(kind: type, given: tuple[Any, ...]) -> None:
    """TypeError: more arguments by position than the class takes, or text where it takes a number,
    or the other way round: the order here may be another than that of a foreign class."""
    parameters = [_parameters(kind)[name] for name in names_by_position(kind)]
    order = f"{kind.__name__}({', '.join(names_by_position(kind))})"
    advice = f"the order here is {order}, so give arguments by name"
    is_open = any(p.kind is p.VAR_POSITIONAL for p in _all_parameters(kind))
    if len(given) > len(parameters) and not is_open:
        raise TypeError(
            f"arguments by position must be at most {len(parameters)}, got {len(given)}: {advice}"
        )

    for place, (parameter, value) in enumerate(zip(parameters, given, strict=False), 1):
        if parameter.name == "eps" and not (isinstance(value, str) and norm_named(value) in NORMS):
            continue  # its own check says more of what is no radius and no norm
        allowed = get_args(parameter.annotation) or (parameter.annotation,)
        if _is_plain(parameter.annotation) and not _goes_with(value, allowed):
            raise TypeError(
                f"{parameter.name} must be {_told(allowed)}, got {value!r} as argument {place}: "
                f"{advice}"
            )


@functools.lru_cache(KEPT)
def _all_parameters(kind: type) -> tuple[inspect.Parameter, ...]:
    """Those of the constructor that the class itself defines, without ``self``."""
    return tuple(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    """Those that have a name of their own."""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in _all_parameters(kind) if p.kind not in open_ended}


def _target(alias: Alias) -> str:
    return alias if isinstance(alias, str) else getattr(alias, "into", "")


def _is_plain(annotation: Any) -> bool:
    """A class, or a union of some; not Any, text, or no annotation at all."""
    known = isinstance(annotation, type | UnionType)
    return known and annotation is not inspect.Parameter.empty


def _goes_with(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value may be of one of these classes, as far as text, truth and nothing go."""
    for special in (str, bool, type(None)):
        if isinstance(value, special):
            return special in allowed or object in allowed
    return bool(set(allowed) - {str, bool, type(None)})


def _told(allowed: tuple[Any, ...]) -> str:
    names = [getattr(kind, "__name__", str(kind)) for kind in allowed]
    return " or ".join("None" if name == "NoneType" else name for name in names)
