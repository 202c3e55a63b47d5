"""The error of a damaged checkpoint. ``require`` raises it where a check fails, ``reading`` where
another library raises an error of its own."""

import reprlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, corrupt or foreign, or could not be written. The message
    names the file and, where one is concerned, the leaf; with several processes, the rank that met
    it."""


def require(ok: bool, where: object, found: object, expected: str) -> None:
    """CheckpointError unless ``ok``. where: the file, and the leaf where there is one."""
    if not ok:
        raise CheckpointError(f"{where}: found {short(found)}, expected {expected}")


@contextmanager
def reading(where: object, what: str) -> Iterator[None]:
    """Whatever zipfile, numpy, msgpack or the file system raises on a broken file becomes a
    CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where}: found {type(error).__name__} ({error}), expected {what}"
        ) from error


def some_names(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    first, more = sorted(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "") or "none"


def short(value: object) -> str:
    """``repr`` for messages; it stays short whatever a file holds."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    """Methods of this class are named after the types whose text they make."""

    def repr_str(self, value: str, level: int) -> str:
        return value if len(value) <= 200 else f"text of {len(value)} characters"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value) if len(value) <= 40 else f"{len(value)} bytes"

    def repr_ExtType(self, value: Any, level: int) -> str:
        return f"msgpack extension {value.code} of {len(value.data)} bytes"


_SHORT = _Short()
_SHORT.maxlevel = 2
