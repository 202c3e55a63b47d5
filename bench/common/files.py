"""Files that are there whole or not at all, as text, bytes or JSON, and names for them."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the target, then rename: an interruption leaves no half-written file, and two
    processes do not write to one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content

    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
