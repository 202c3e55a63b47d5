"""Where runs lie below a folder. Folders of other programs and half-written files are passed by."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEPEST = 4  # folders below the one that is searched
# What lies inside a run and holds no run of its own.
INNER = {"results", "checkpoints", "adversarial", "__pycache__"}
SETTINGS, REPORT, ROWS = "settings.json", "report.json", "rows.json"


def run_folders(folder: Path) -> Iterator[Path]:
    """The folders that hold the settings of a run or a file of rows, in the order of their names.
    Links are not followed, and what may not be read is passed by."""
    for name, inner, files in os.walk(folder):
        depth = len(Path(name).relative_to(folder).parts)
        inner[:] = sorted(
            each for each in inner if each not in INNER and not each.startswith(".")
        ) if depth < DEEPEST else []  # fmt: skip
        if {SETTINGS, ROWS} & {*files}:
            yield Path(name)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file; an empty dict if it is not there, is half written or is no dict."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
