"""The numbers of a run, over seeds: the one structure that table, pictures and report.json are made
from."""

from statistics import mean, stdev
from typing import Any

from ironmoe.attacks import Proportion
from ironmoe.bench.reports.cells import brackets, percent


class ModelResults:
    """What was measured of one architecture.

    runs: a dictionary for each seed, with what ``measure_clean``, ``measure_robust`` and
    ``measure_routing`` gave.
    """

    def __init__(self, name: str, runs: list[dict[str, Any]]) -> None:
        self.name, self.runs = name, runs

    @property
    def eps(self) -> list[float]:
        return [attack["eps_255"] for attack in self.runs[0]["attacks"]]

    @property
    def layers(self) -> list[str]:
        """Names of the MoE layers; none for a dense model."""
        return list(self.runs[0]["routing"][0]["layers"]) if self.runs[0]["routing"] else []

    def clean(self) -> "Spread":
        return Spread([_proportion(run["clean"]) for run in self.runs])

    def robust(self, i: int) -> "Spread":
        """At the i-th eps."""
        return Spread([_proportion(run["attacks"][i]["robust"]) for run in self.runs])

    def attack_speed(self) -> float:
        """Images per second through all attacks, start to verdict."""
        attacks = [attack for run in self.runs for attack in run["attacks"]]
        return sum(a["robust"]["total"] for a in attacks) / sum(a["seconds"] for a in attacks)

    def forward_speed(self) -> float:
        return mean(run["images_per_second"] for run in self.runs)

    def routing_change(self, layer: str, i: int) -> float:
        """Mean over seeds of 1 − IoU at the i-th eps."""
        return mean(run["routing"][i]["layers"][layer]["change"] for run in self.runs)

    def load(self, layer: str, i: int | None, run: int = 0) -> list[float]:
        """Each expert's share in one run, on adversarial images at the i-th eps, or on clean ones
        for None.

        Not averaged over seeds: expert 3 of one training has nothing to do with expert 3 of
            another.
        """
        key = "load_clean" if i is None else "load_adversarial"
        loads: list[float] = self.runs[run]["routing"][i or 0]["layers"][layer][key]
        return loads

    def imbalance(self, layer: str, i: int | None) -> float:
        """The busiest expert's share over the even share, mean over seeds: 1 is balanced, E is one
        expert for all."""
        loads = [self.load(layer, i, run) for run in range(len(self.runs))]
        return mean(max(load) * len(load) for load in loads)


class Spread:
    """A proportion measured for each seed. One seed gives a Wilson interval, several give mean and
    standard deviation."""

    def __init__(self, proportions: list[Proportion]) -> None:
        self.proportions = proportions
        self.values = [p.value for p in proportions]
        self.mean = mean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of one seed; mean ± standard deviation over seeds otherwise."""
        if len(self.values) == 1:
            return self.proportions[0].interval()
        deviation = stdev(self.values)
        return max(0.0, self.mean - deviation), min(1.0, self.mean + deviation)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{percent(self.proportions[0])} {brackets(self.interval)}"
        spread = f"{100 * self.mean:.1f} ± {100 * stdev(self.values):.1f} %"
        return f"{spread} {brackets((min(self.values), max(self.values)))}"


def _proportion(stored: dict[str, Any]) -> Proportion:
    return Proportion(stored["count"], stored["total"])
