"""A constructor that also takes what other libraries call its arguments.

The names are turned once, by the constructor that the user called, before any argument is bound.
What is ``Only`` taken for some values goes on to the class that wrote it down, and ends there.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from ironmoe.attacks.aliases.declared import Only, Turned
from ironmoe.attacks.aliases.own import (
    alias_of,
    check_positions,
    declared_in,
    names_by_position,
    own_arguments,
)

MADE = "_made_with"
"""An attack of the library has this attribute once its constructor has ended: the arguments, under
the names here."""


def with_aliases(kind: type) -> Callable[..., None]:
    """The constructor of a class, with the aliases of the class."""
    plain: Callable[..., None] = kind.__init__  # type: ignore[misc]

    @functools.wraps(plain)
    def takes_aliases(self: Any, *by_position: Any, **by_name: Any) -> None:
        check_positions(kind, by_position)
        filled = names_by_position(kind)[: len(by_position)]
        named = with_own_names(kind, by_name, filled)
        plain(self, *by_position, **without_checked(kind, named))
        if type(self) is kind and kind.__module__.startswith("ironmoe.attacks."):
            vars(self)[MADE] = dict(zip(filled, by_position, strict=False)) | named

    return takes_aliases


def with_own_names(kind: type, given: dict[str, Any], filled: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments under the names that a class has for them.

    Args:
        given: name → value, as the user wrote it.
        filled: the arguments that were given by position.

    Raises:
        TypeError: an argument was given twice, under whatever names.
        ValueError: a foreign value that nothing here corresponds to.
    """
    own = own_arguments(kind)
    found: dict[str, Any] = {}
    written = dict.fromkeys(filled, "by position")
    for name, value in given.items():
        into, here = _turned(kind, name, value)
        if into != name and into not in own and not isinstance(alias_of(kind, into), Only):
            into, here = name, value  # a name for something that this class does not have
        if into in written:
            raise TypeError(
                f"{into} must be given once, got it {written[into]} and as {name}={value!r}"
            )
        written[into] = f"as {name}={value!r}"
        found[into] = here
    return found


def without_checked(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that change nothing in a class. ValueError: one of them asks for
    something that is not done here."""
    left = dict(given)
    for name, alias in declared_in(kind).items():
        if isinstance(alias, Only) and alias_of(kind, name) is alias and name in left:
            value = left.pop(name)
            if not alias.takes(value):
                raise ValueError(f"{name} must be {alias.allowed}, got {value!r}: {alias.instead}")
    return left


def _turned(kind: type, name: str, value: Any) -> tuple[str, Any]:
    """(name, value) as a class has them."""
    alias = alias_of(kind, name)
    if isinstance(alias, str):
        return alias, value
    if isinstance(alias, Turned):
        return alias.into, alias.how(value)
    return name, value
