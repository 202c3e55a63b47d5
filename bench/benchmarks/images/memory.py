"""Peak memory of a process and of its workers, in a process of its own."""

import resource
import sys
from collections.abc import Callable
from typing import Any

from ironmoe.bench.common.processes import Pool

Row = dict[str, Any]
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that getrusage counts in


def in_a_process(work: Callable[..., Row], *arguments: Any) -> Row:
    """The row that ``work`` returns, made in a fresh process, with what memory it took at most.

    peak_mb: of that process; worker_peak_mb: of the largest of its workers that have ended.
    """
    with Pool(1) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., Row], *arguments: Any) -> Row:
    row = work(*arguments)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return row | {"peak_mb": mine * UNIT / 1e6, "worker_peak_mb": largest * UNIT / 1e6}
