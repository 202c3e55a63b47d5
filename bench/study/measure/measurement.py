"""A measurement, what it returns, and the register of all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe.distributed import RanksDisagreeError


class Outcome(NamedTuple):
    """values: name → a number of the model; images: name → a number of each of the first images of
    the sample. A name is "what", "what@radius" or "what@radius:how"; radii are in units of 1/255 of
    the pixel range. NaN: there is no such number, as of a layer without tokens. problems: why
    the model, or a part of the measurement, cannot be measured."""

    values: dict[str, float] = {}  # noqa: RUF012 - nobody writes to it
    images: dict[str, list[float]] = {}  # noqa: RUF012
    problems: tuple[str, ...] = ()

    def __add__(self, other: object) -> "Outcome":
        """Both together. TypeError: ``other`` is none; ValueError: they share a name."""
        if not isinstance(other, Outcome):
            return NotImplemented
        for one, two in ((self.values, other.values), (self.images, other.images)):
            if shared := set(one) & set(two):
                raise ValueError(f"names must be new, got {sorted(shared)} again")
        return Outcome(
            self.values | other.values,
            self.images | other.images,
            self.problems + other.problems,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict()


class Measurement(NamedTuple):
    """what: a sentence for the report; settings: the part of the budget that it depends on; passes:
    about how many forward and backward passes of one image it takes, for estimates of time;
    needs_experts: a dense model has no such numbers; needs_whole_weights: it does more than to call
    the model, so one process measures it by itself where several could share the weights;
    is_optional: only made if it is asked for;
    version: raise it when the same model would get other numbers, so that kept ones are not
    taken."""

    name: str
    what: str
    measure: Callable[[Subject, Budget], Outcome]
    settings: tuple[str, ...]
    passes: Callable[[Budget], float]
    needs_experts: bool = False
    is_optional: bool = False
    version: int = 1
    needs_whole_weights: bool = False


MEASUREMENTS: dict[str, Measurement] = {}


def part(name: str, measure: Callable[[], Outcome]) -> Outcome:
    """The outcome of one part of a measurement, so that the others are kept where a model refuses
    this one. name: of the part, for its problem."""
    try:
        return measure()
    except RanksDisagreeError:  # says nothing of the model
        raise
    except ValueError as error:
        return Outcome(problems=(f"{name}: {error}",))


def measurement(
    name: str,
    what: str,
    *,
    settings: tuple[str, ...],
    passes: Callable[[Budget], float],
    needs_experts: bool = False,
    needs_whole_weights: bool = False,
    is_optional: bool = False,
    version: int = 1,
) -> Callable[[Callable[[Subject, Budget], Outcome]], Callable[[Subject, Budget], Outcome]]:
    """Register the function below as a measurement.

    Raises:
        ValueError: ``settings`` names something that no ``Budget`` has.
    """
    unknown = set(settings) - set(Budget._fields)
    if unknown:
        raise ValueError(f"settings must be fields of Budget, got {sorted(unknown)}")

    def register(
        measure: Callable[[Subject, Budget], Outcome],
    ) -> Callable[[Subject, Budget], Outcome]:
        MEASUREMENTS[name] = Measurement(
            name,
            what,
            measure,
            settings,
            passes,
            needs_experts,
            is_optional,
            version,
            needs_whole_weights,
        )
        return measure

    return register


def numbers(values: Tensor) -> list[float]:
    """One number of each image, rounded to the seven digits that float32 has."""
    return [float(f"{value:.7g}") for value in values.double().tolist()]
