"""What follows the name of a model or of a set: ``?key=value&key=value``."""

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from ironmoe.moe.checkpoints.errors import CheckpointError

Reader = Callable[[str], Any]


def split_query(spec: str, option: str = "--model") -> tuple[str, dict[str, str]]:
    """(what stands before the question mark, key → text). option: how errors call it.

    Raises:
        CheckpointError: a part is no key=value, or a key comes twice.
    """
    name, _, query = spec.partition("?")
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, text = part.partition("=")
        if not equals or not key or key in found:
            wrong = "twice" if key in found else "without a value"
            raise CheckpointError(
                f"{option} {spec} must be NAME?key=value&key=value with each key once, got "
                f"{key!r} {wrong}"
            )
        found[key] = unquote(text)
    return name, found


def read_value(text: str) -> Any:
    """A whole number, a decimal, true, false, none, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def read_known(spec: str, query: Mapping[str, str], known: Mapping[str, Reader]) -> dict[str, Any]:
    """The values of a query all of whose keys are known.

    Raises:
        CheckpointError: a key is not known, or its reader raised ValueError; it names the key.
    """
    values = {}
    for key, text in query.items():
        try:
            values[key] = known[key](text)
        except (KeyError, ValueError):
            keys = ", ".join(known) or "nothing"
            raise CheckpointError(f"--model {spec} may set {keys}, got {key}={text!r}") from None
    return values
