"""Files that are there whole or not at all, as text, bytes or JSON, and names for them."""

import glob
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside the target. It takes the target's place when the block ends without an
    error: an interruption leaves no half-written file, and two processes do not write to one.

    A kill leaves what it has written so far; the next write to the target removes that.
    """
    begin = f"{path.name}.{socket.gethostname()}."
    partial = path.with_name(f"{begin}{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where it is
        raise

    for left in path.parent.glob(f"{glob.escape(begin)}*{PARTIAL}"):
        process = left.name.removeprefix(begin).removesuffix(PARTIAL)
        if process.isdecimal() and not _runs(int(process)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether this machine may have such a process now."""
    if os.name != "posix":  # elsewhere signal 0 is a signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number of a process
        return True
    return True


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write the file; it is there whole or not at all."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def finite(value: Any) -> Any:
    """The same structure with None in place of NaN and infinity, for which JSON has no number."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write ``finite(content)``, whole or not at all."""
    write_atomically(path, json.dumps(finite(content), indent=1, allow_nan=False))


def write_json_lines(path: Path, content: Any, depth: int) -> None:
    """Write ``finite(content)``, whole or not at all, with a line for each entry of its first
    ``depth`` levels and none for what is deeper: long lists stay in one line."""
    write_atomically(path, _lines(finite(content), depth) + "\n")


def _lines(content: Any, depth: int) -> str:
    if depth and content and isinstance(content, dict):
        inner = [f"{json.dumps(key)}: {_lines(value, depth - 1)}" for key, value in content.items()]
        return "{\n" + ",\n".join(inner) + "\n}"
    if depth and content and isinstance(content, list):
        return "[\n" + ",\n".join(_lines(value, depth - 1) for value in content) + "\n]"
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def slug(name: str, separator: str = "-") -> str:
    """A name as part of a file's name: lower-case letters and digits, ``separator`` for the rest.

    "V-MoE seed 0" becomes "v-moe-seed-0".
    """
    return re.sub("[^a-z0-9]+", separator, name.lower()).strip(separator)
