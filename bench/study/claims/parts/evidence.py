"""What was measured, as claims ask for it: by arm and seed."""

from collections.abc import Iterable, Sequence
from math import isfinite, nan
from statistics import fmean

from ironmoe.bench.study.claims.parts.outcomes import measurement_of, title
from ironmoe.bench.study.claims.parts.units import Unit
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.statistics.measured import Measured


class Evidence:
    """The runs of one training. chance: the accuracy of guessing.

    Raises:
        ValueError: two runs of one arm and seed, runs of an arm that is not among ``arms``, or two
            arms of one name.
    """

    def __init__(
        self, runs: Iterable[Measured], arms: Sequence[Arm], *, chance: float = 0.0
    ) -> None:
        self.arms = tuple(arms)
        self.chance = chance
        names = [arm.name for arm in arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms must have a name each, got {names}")

        self._runs: dict[str, dict[int, Measured]] = {name: {} for name in names}
        for run in runs:
            if run.arm not in self._runs:
                raise ValueError(f"arm of a run must be among {names}, got {run.arm!r}")
            if run.seed in self._runs[run.arm]:
                raise ValueError(
                    f"runs must differ in arm or seed, got two of {run.arm!r}, seed {run.seed}"
                )
            self._runs[run.arm][run.seed] = run

    def value_names(self) -> list[str]:
        """The names of all numbers of any run, in the order in which they first come."""
        runs = (run for by_seed in self._runs.values() for run in by_seed.values())
        return list(dict.fromkeys(key for run in runs for key in run.values))

    def by_seed(self, arm: Arm, key: str, unit: Unit) -> dict[int, float]:
        """A number of an arm on the scale of ``unit``, for the seeds that have it."""
        numbers = {
            seed: unit.scale(run.values.get(key, nan)) for seed, run in self._of(arm).items()
        }
        return {seed: number for seed, number in sorted(numbers.items()) if isfinite(number)}

    def mean(self, arm: Arm, key: str) -> float | None:
        """The mean of a number over the runs of an arm as it was measured; None without any."""
        numbers = [run.values.get(key, nan) for run in self._of(arm).values()]
        finite = [number for number in numbers if isfinite(number)]
        return fmean(finite) if finite else None

    def differences(
        self, key: str, unit: Unit, one: Arm, other: Arm, other_key: str | None = None
    ) -> dict[int, float]:
        """``one`` − ``other``, for the seeds that both have; ``other_key``: what is taken of
        ``other``, the same number by default."""
        first = self.by_seed(one, key, unit)
        second = self.by_seed(other, key if other_key is None else other_key, unit)
        return {seed: first[seed] - second[seed] for seed in first if seed in second}

    def images(self, arm: Arm, key: str) -> dict[int, list[float]]:
        """A number of each image of an arm, for the seeds that have it."""
        runs = sorted(self._of(arm).items())
        return {seed: run.images[key] for seed, run in runs if key in run.images}

    def seeds(self, arms: Iterable[Arm]) -> set[int]:
        """All seeds that any of these arms was trained with."""
        return {seed for arm in arms for seed in self._of(arm)}

    def lacking(self, arm: Arm, key: str) -> str:
        """What is missing if ``by_seed`` or ``images`` is empty."""
        if not self._of(arm):
            return f"runs of {arm.name}"
        if any(key in run.values for run in self._of(arm).values()):
            return f"{title(key)} of {arm.name} that can be compared: it is 0 or not known"
        measurement = measurement_of(key)
        return f"{title(key)} of {arm.name}" + f" (measurement “{measurement}”)" * bool(measurement)

    def _of(self, arm: Arm) -> dict[int, Measured]:
        return self._runs.get(arm.name, {})
