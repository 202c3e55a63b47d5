"""Do the same work on many items in several processes, for a limited time.

So kernels are compiled on all cores. Who runs them later finds them in Triton's cache.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_processes(
    work: Callable[[T], object], items: Sequence[T], workers: int, seconds: float
) -> int:
    """Work on the items until all are done or the seconds are over; then all processes end.

    Args:
        work: a function of a module. What it returns or raises does not matter.

    Returns:
        How many items were done, failures included.
    """
    if not items or workers < 1 or seconds <= 0:
        return 0
    end, done = time.monotonic() + seconds, 0
    with multiprocessing.get_context("spawn").Pool(min(workers, len(items))) as pool:  # terminates
        results = pool.imap_unordered(work, items)
        while done < len(items):
            try:
                results.next(max(end - time.monotonic(), 0.0))
            except multiprocessing.TimeoutError:
                break
            except Exception:  # the item fails again where its result is used
                pass
            done += 1

    return done
