"""Options that count something: steps, restarts, targets, classes."""

import operator
from typing import Any


def check_counts(least: int, **counts: Any) -> None:
    """TypeError, ValueError: one of the counts is no whole number, or below ``least``."""
    for name, count in counts.items():
        try:
            operator.index(count)
        except TypeError:
            raise TypeError(
                f"{name} must be a whole number, at least {least}, got {count!r}"
            ) from None
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")


def all_other_classes(n_classes: int) -> int:
    """How many targets an example has where every wrong class is one."""
    check_counts(2, n_classes=n_classes)
    return n_classes - 1
