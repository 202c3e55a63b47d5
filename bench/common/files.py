"""Files that are there whole or not at all, as text, bytes or JSON, and names for them."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the target, then rename: an interruption leaves no half-written file."""
    partial = path.with_name(path.name + ".partial")
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


def slug(name: str, separator: str = "-") -> str:
    """A name as part of a file's name: lower-case letters and digits, ``separator`` for the rest.

    "V-MoE seed 0" becomes "v-moe-seed-0".
    """
    return re.sub("[^a-z0-9]+", separator, name.lower()).strip(separator)
