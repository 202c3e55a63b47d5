"""The same work on many items, in processes beside each other, for a while: kernels are compiled on
all cores, and whoever runs them next finds them in Triton's cache.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_processes(
    work: Callable[[T], object], items: Sequence[T], workers: int, seconds: float
) -> int:
    """How many items were done, failures included, when the seconds were over; then all processes
    end.

    ``work`` is a function of a module; what it returns or raises does not matter.
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
            except Exception:  # what one item does wrong is seen again where it matters
                pass
            done += 1
    return done
