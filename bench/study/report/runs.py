"""The runs of a study, as tables and figures ask for their numbers."""

from collections.abc import Iterable, Sequence
from math import isfinite, nan

from ironmoe.bench.common.radii import exact
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.report.facts import StudyFacts
from ironmoe.bench.study.statistics.measured import Measured


class StudyRuns:
    """All runs. trainings: names, in the order in which they first come; arms: in the order of the
    study."""

    def __init__(self, rows: Iterable[Measured], arms: Sequence[Arm], facts: StudyFacts) -> None:
        self.arms = list(arms)
        self.facts = facts
        self._rows: dict[str, dict[str, dict[int, Measured]]] = {}
        for row in sorted(rows, key=lambda row: row.seed):
            self._rows.setdefault(row.training, {}).setdefault(row.arm, {})[row.seed] = row
        self.trainings = [*dict.fromkeys([*facts.budgets, *self._rows])]
        self.trainings = [training for training in self.trainings if training in self._rows]

    def values(self, training: str, arm: Arm, key: str) -> dict[int, float]:
        """Seed → a number that is finite."""
        found = {seed: row.values.get(key, nan) for seed, row in self._of(training, arm).items()}
        return {seed: value for seed, value in found.items() if isfinite(value)}

    def images(self, training: str, arm: Arm, key: str) -> dict[int, list[float]]:
        """Seed → a number of each of the first images, NaN included."""
        rows = self._of(training, arm).items()
        return {seed: row.images[key] for seed, row in rows if key in row.images}

    def seeds(self, training: str, arm: Arm) -> list[int]:
        """Of all runs of an arm."""
        return list(self._of(training, arm))

    def count(self) -> int:
        """Of all runs."""
        return sum(len(of_arm) for arms in self._rows.values() for of_arm in arms.values())

    def radii(self, training: str, before: str, after: str = "") -> list[float]:
        """At which any run has a number "before@radiusafter", ascending, in units of 1/255."""
        start = f"{before}@"
        found = set()
        for name in self._names(training):
            middle = name[len(start) : len(name) - len(after)]
            if name == f"{start}{middle}{after}" and _is_radius(middle):
                found.add(float(middle))
        return sorted(found)

    def layers(self, training: str, before: str) -> list[str]:
        """Of which any run has a number "before:layer", in the order in which they first come."""
        start = f"{before}:"
        names = [name[len(start) :] for name in self._names(training) if name.startswith(start)]
        return list(dict.fromkeys(names))

    def before(self, training: str, after: str) -> list[str]:
        """What stands before ``after`` in the names of numbers that end in it, in the order in
        which they first come: "none" of "none:clean"."""
        found = [name.removesuffix(after) for name in self._names(training) if name.endswith(after)]
        return [name for name in found if name and ":" not in name]

    def has(self, key: str) -> bool:
        """Whether any run has a number of this name, with a radius or a layer behind it or not, of
        the model or of its images."""
        return any(
            name == key or name.startswith((f"{key}@", f"{key}:"))
            for arms in self._rows.values()
            for of_arm in arms.values()
            for row in of_arm.values()
            for name in (*row.values, *row.images)
        )

    def image_count(self, key: str) -> int:
        """How many images the longest list of this name has, with a radius behind it or not."""
        return max(
            (
                len(row)
                for arms in self._rows.values()
                for of_arm in arms.values()
                for run in of_arm.values()
                for name, row in run.images.items()
                if name == key or name.startswith(f"{key}@")
            ),
            default=0,
        )

    def images_asked(self, setting: str) -> int:
        """How many images this setting of a budget stands for, at most all test images."""
        counts = [getattr(budget, setting) for budget in self.facts.budgets.values()]
        return min(self.facts.test_images, max(counts, default=0))

    def budget(self, training: str) -> Budget:
        """How much was measured of the models of a training."""
        return self.facts.budgets.get(training, Budget())

    def at_radius(self, training: str, before: str) -> str:
        """The name of a number at the one radius of the budget."""
        return f"{before}@{exact(self.budget(training).radius)}"

    def _of(self, training: str, arm: Arm) -> dict[int, Measured]:
        return self._rows.get(training, {}).get(arm.name, {})

    def _names(self, training: str) -> list[str]:
        rows = [row for of_arm in self._rows.get(training, {}).values() for row in of_arm.values()]
        return list(dict.fromkeys(name for row in rows for name in row.values))


def _is_radius(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
