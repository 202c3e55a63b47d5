"""A robust accuracy that may not be known yet: a number, or a range where images are undecided."""

from dataclasses import dataclass
from typing import Any

from ironmoe.attacks.evaluation.expected import ExpectedAccuracy
from ironmoe.attacks.evaluation.proportion import Proportion

Known = Proportion | ExpectedAccuracy


class UndecidedError(ValueError):
    """One number was asked for where a budget left a range."""


@dataclass(frozen=True)
class AccuracyRange:
    """An accuracy of which a budget left some images undecided.

    It has no ``value`` and no ``count``: to ask for them is an error that says what there is.

    most: the accuracy if all undecided images hold
    undecided: how many images these are, at least 1
    """

    most: Known
    undecided: int

    @property
    def least(self) -> Known:
        """The accuracy if all undecided images fall."""
        return self.most.without(self.undecided)

    @property
    def total(self) -> int:
        """How many images."""
        return self.most.total

    @property
    def value(self) -> float:
        """Raises UndecidedError."""
        raise self._error("value")

    @property
    def count(self) -> float:
        """Raises UndecidedError."""
        raise self._error("count")

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """From the lower end of ``least`` to the upper end of ``most``: it allows for every way in
        which the undecided images may turn out."""
        return self.least.interval(confidence)[0], self.most.interval(confidence)[1]

    def as_dict(self) -> dict[str, Any]:
        """The keys of ``most``, where "count" and "value" are None."""
        numbers = self.most.as_dict() | {"count": None, "value": None}
        (name,) = numbers.keys() & {"wilson_95", "interval_95"}
        return numbers | {name: list(self.interval())}

    def _error(self, name: str) -> UndecidedError:
        return UndecidedError(
            f"{name} must be asked of a finished evaluation, got one in which {self.undecided} of "
            f"{self.total} images are undecided: ask .least.{name} and .most.{name}, or let it go "
            "on without a budget"
        )

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{share(self)} [{100 * low:.1f}, {100 * high:.1f}], {self.undecided} undecided"


Accuracy = Known | AccuracyRange
"""An accuracy in a report: a ``Proportion``; of a model that answers each time anew, an
``ExpectedAccuracy``; where a budget left images undecided, an ``AccuracyRange``."""


def share(accuracy: Accuracy) -> str:
    """In percent: "12.5 %", or "12.5 to 25.0 %" where images are undecided."""
    if not accuracy.total:
        return "–"
    if accuracy.undecided:
        return f"{100 * accuracy.least.value:.1f} to {100 * accuracy.most.value:.1f} %"
    return f"{100 * accuracy.value:.1f} %"


def numbers_of(accuracy: Accuracy) -> dict[str, Any]:
    """Ready for JSON: "count" and "value", which are None where images are undecided; "least" and
    "most", which are always there; "undecided", "total", and the interval."""
    ends = {"least": accuracy.least.value, "most": accuracy.most.value}
    return accuracy.as_dict() | ends | {"undecided": accuracy.undecided}
