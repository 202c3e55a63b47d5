"""A line for each kernel on each chip: launches, programs, instructions, the tiles that were seen,
what was reported.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any


def lines(path: Path) -> Iterator[str]:
    """The table of the launches noted in a file, one JSON object a line."""
    launches = [json.loads(line) for line in path.read_text().splitlines()]
    launches.sort(key=_key)
    yield (
        f"{'kernel':24} {'chip':6} {'launches':>8} {'programs':>8} {'instructions':>13} "
        f"{'seconds':>8} {'reports':>8}  tiles"
    )
    for (kernel, chip), group in groupby(launches, _key):
        yield _line(kernel.removesuffix("_kernel"), chip, list(group))
    yield _line("all", "", launches)


def _key(launch: dict[str, Any]) -> tuple[str, str]:
    return launch["kernel"], launch["chip"]


def _line(kernel: str, chip: str, launches: list[dict[str, Any]]) -> str:
    programs, executed, seconds = (
        sum(launch[name] for launch in launches) for name in ("programs", "executed", "seconds")
    )
    reports = sum(len(launch["reports"]) for launch in launches)
    tiles = sorted({launch["tile"] for launch in launches if launch["tile"]}) if chip else []
    return (
        f"{kernel:24} {chip:6} {len(launches):8} {programs:8} {executed:13} {seconds:8.1f} "
        f"{reports:8}  {' '.join(tiles)}"
    )
