"""What lies where a file of rows is to be written."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from ironmoe.attacks.evaluation.describe import differences
from ironmoe.bench.common.machine.origin import origin
from ironmoe.bench.common.run_folder import OutputError

OTHER_FORMS = (".csv", ".md")  # bench compare takes a file by its ending
ROUNDING = 1e-9  # relative, of a quartile between two equal times
KEYS = {"benchmark", "settings", "made", "sessions", "rows"}


def found_rows(path: Path, benchmark: str) -> dict[str, Any] | None:
    """The content of a file of rows; None if there is no file, or an empty one.

    Raises:
        OutputError: no file can be there, or it holds something else.
    """
    check_json(path)
    try:
        text = path.read_text() if path.exists() else ""
        found = json.loads(text) if text.strip() else None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError:
        found = {}

    if found is None or _is_of(found, benchmark):
        return found
    raise OutputError(
        f"{path} holds something else than rows of ironmoe {benchmark}; choose another file with "
        "--out"
    )


def beside(path: Path, benchmark: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files of rows of the same benchmark in the other folders that it has by default, the newest
    first, each with its content. There are none if ``path`` is in no such folder."""
    kind = benchmark.replace(" ", "-")
    if not path.parent.name.startswith(f"{kind}-"):
        return
    files = [file for file in path.parent.parent.glob(f"{kind}-*/{path.name}") if file != path]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            found = found_rows(file, benchmark)
        except OutputError:
            continue
        if found is not None:
            yield file, found


def check_json(path: Path) -> None:
    """OutputError: no file of JSON can be there, or its ending would promise another form."""
    check_place(path)
    if path.suffix.lower() in OTHER_FORMS:
        raise OutputError(
            f"--out writes JSON, got {path}; choose a file that ends in .json, and --format for "
            "another form"
        )


def check_place(path: Path) -> None:
    """OutputError: no file can be there."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"--out must be a file in a folder that exists, got {path}")
    if path.exists() and not path.is_file():
        what = "the folder" if path.is_dir() else "the device"
        raise OutputError(f"--out must be a file, got {what} {path}")


def differing(found: dict[str, Any], settings: Any, made: dict[str, Any]) -> list[str]:
    """How the rows of a file were measured otherwise than they would be now, in words: "batch_size:
    100 there, 200 now"."""
    there = {"settings": found["settings"]} | origin(found["made"])
    now = {"settings": settings} | origin(made)
    return [line.removeprefix("settings.") for line in differences(there, now)]


def is_list_of_dicts(value: Any) -> bool:
    """Whether rows, or sessions, can be this value."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def are_times(values: Iterable[Any]) -> bool:
    """Whether all of these can be times that were measured: finite numbers above 0."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        for value in values
    )


def are_ascending_times(values: Iterable[Any]) -> bool:
    """Whether these can be times of the same runs in this order, such as the fastest, the median
    and the slowest. Interpolation may have rounded them."""
    times = list(values)
    return are_times(times) and all(a <= b * (1 + ROUNDING) for a, b in pairwise(times))


def is_share(value: Any) -> bool:
    """Whether this can be a share, from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def is_count(value: Any) -> bool:
    """Whether this can be a number of runs."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def sound_rows(
    rows: list[dict[str, Any]], names: Sequence[str], is_whole: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """The rows that nobody has changed, as far as they show it: each has the date on which it was
    measured and the figures of its benchmark, and no other row has its key. Of two with one key
    nobody knows which was measured.

    Args:
        names: of the entries that tell rows from others; without any, rows may be alike.
    """
    keys = [json.dumps([row.get(name) for name in names]) for row in rows] if names else []
    times = Counter(keys)
    return [
        row
        for number, row in enumerate(rows)
        if _is_date(row.get("measured"))
        and is_whole(row)
        and not (keys and times[keys[number]] > 1)
    ]


def _is_date(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def is_made(value: Any) -> bool:
    """Whether ``origin`` can read this value, which may be of a former version."""
    return isinstance(value, dict) and isinstance(value.get("machine", {}), dict)


def _is_of(found: Any, benchmark: str) -> bool:
    return (
        isinstance(found, dict)
        and found.keys() >= KEYS
        and found["benchmark"] == benchmark
        and is_made(found["made"])
        and all(is_list_of_dicts(found[key]) for key in ("sessions", "rows"))
    )
