"""The arguments that certificates and predictions of smoothed models share."""

import operator
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Model, Normalize
from ironmoe.attacks.evaluation.source import Batches
from ironmoe.attacks.extra import cut
from ironmoe.attacks.methods.pgd import PGD

# Images are in at least float32, where noise within these neither vanishes nor overflows.
LOWEST_SIGMA = 1e-30
HIGHEST_SIGMA = 1e30


def as_sigma(value: Any) -> float:
    """TypeError, ValueError: it is no standard deviation that float32 can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"sigma must be a number, got {value!r}")
    if not LOWEST_SIGMA <= float(value) <= HIGHEST_SIGMA:
        raise ValueError(
            f"sigma must lie between {LOWEST_SIGMA:g} and {HIGHEST_SIGMA:g}, got {value}"
        )
    return float(value)


def as_alpha(value: Any) -> float:
    """ValueError: it is no probability of an error, or one of 0 or 1."""
    if not isinstance(value, Real) or not 0 < float(value) < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {value!r}")
    return float(value)


def as_seed(value: Any) -> int:
    """TypeError: it is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"seed must be an int, got {value!r}") from None


def as_count(name: str, value: Any) -> int:
    """The argument with this name, a number of copies and the like: any whole number from 1 on, of
    whatever integral type. TypeError, ValueError: it is none."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None

    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def as_limit(value: Any) -> int | None:
    """As ``as_count``; None: no limit."""
    return None if value is None else as_count("limit", value)


def as_attack(
    model: Model,
    bounds: Bounds,
    normalize: Normalize | None,
    logits_fn: Callable[[Any], Tensor] | None,
) -> Attack:
    """How the model is called and which images it takes, in the form that data and journals know:
    an attack that goes nowhere."""
    return PGD(
        model, 0.0, steps=0, norm="L2", bounds=bounds, normalize=normalize, logits_fn=logits_fn
    )


def first_images(data: Batches, limit: int | None) -> Batches:
    """The first ``limit`` images of the data, or all. No batch after them is read. What is no data
    comes back as it is, to be refused by who reads it."""
    if limit is None:
        return data
    if isinstance(data, tuple):
        return _cut(data, limit) if _is_batch(data) else data
    if isinstance(data, Iterable) and not isinstance(data, Tensor):
        return _first_of_stream(data, limit)
    return data


def _first_of_stream(batches: Iterable[Any], limit: int) -> Iterator[Any]:
    left = limit
    for batch in batches:
        yield _cut(batch, left) if _is_batch(batch) else batch
        left -= len(batch[1])
        if left <= 0:
            return


def _is_batch(batch: Any) -> bool:
    """Whether it is (images, labels) or (images, labels, extra), with as many labels as images."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        return False
    both = batch[:2]
    are_rows = all(isinstance(part, Tensor) and part.ndim for part in both)
    return are_rows and len(both[0]) == len(both[1])


def _cut(batch: Any, count: int) -> Any:
    images, labels, *extra = batch
    first = slice(0, count)
    return (images[first], labels[first], *(cut(each, len(labels), first) for each in extra))
