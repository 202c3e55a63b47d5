"""The numbers of a run over its seeds, from which table, pictures and report.json are made."""

from statistics import mean, stdev
from typing import Any

from ironmoe.attacks import Proportion
from ironmoe.bench.reports.cells import brackets, percent

STATES = ("tripped", "passed", "not looked at")  # of a check, the worst first


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
        """The names of the MoE layers whose routing was measured in every run; none for a dense
        model, and where a run had no image to attack."""
        measured = [at["layers"] for run in self.runs for at in run["routing"]]
        return (
            [name for name in measured[0] if all(name in at for at in measured)] if measured else []
        )

    @property
    def runs_at_chance(self) -> list[dict[str, Any]]:
        """The runs whose clean accuracy cannot be told from chance: its interval reaches down to
        it."""
        return [
            run for run in self.runs if _proportion(run["clean"]).interval()[0] <= run["chance"]
        ]

    @property
    def anything_fell(self) -> bool:
        """Whether the attack broke any image that was right from the start, in any run."""
        return any(
            attack["robust"]["count"] < run["clean"]["count"]
            for run in self.runs
            for attack in run["attacks"]
        )

    @property
    def counted_checks(self) -> dict[str, int]:
        """How many checks against false security "passed", "tripped" or were "not looked at"; one
        that tripped in any run counts as tripped, one that no run looked at as not looked at."""
        states = [flag["state"] for flag in self.checks]
        return {state: states.count(state) for state in STATES}

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Each check as the run has it in which it looks worst."""
        worst: dict[str, dict[str, Any]] = {}
        for flag in (flag for run in self.runs for flag in run["checks"]):
            known = worst.setdefault(flag["name"], flag)
            if STATES.index(flag["state"]) < STATES.index(known["state"]):
                worst[flag["name"]] = flag
        return list(worst.values())

    def clean(self) -> "Spread":
        """Accuracy on clean images."""
        return Spread([_proportion(run["clean"]) for run in self.runs])

    def robust(self, i: int) -> "Spread":
        """Robust accuracy at the i-th eps."""
        return Spread([_proportion(run["attacks"][i]["robust"]) for run in self.runs])

    def attack_speed(self) -> float:
        """Images per second through all attacks, from start to verdict."""
        attacks = [attack for run in self.runs for attack in run["attacks"]]
        return sum(a["robust"]["total"] for a in attacks) / sum(a["seconds"] for a in attacks)

    def forward_speed(self) -> float:
        return mean(run["images_per_second"] for run in self.runs)

    def routing_change(self, layer: str, i: int) -> float:
        """1 − IoU at the i-th eps, mean over seeds."""
        return mean(run["routing"][i]["layers"][layer]["change"] for run in self.runs)

    def load(self, layer: str, i: int | None, run: int = 0) -> list[float]:
        """Each expert's share in one run, on adversarial images at the i-th eps; None is clean
        images.

        Seeds are not averaged: expert 3 of one training has nothing to do with expert 3 of another.
        """
        key = "load_clean" if i is None else "load_adversarial"
        loads: list[float] = self.runs[run]["routing"][i or 0]["layers"][layer][key]
        return loads

    def imbalance(self, layer: str, i: int | None) -> float:
        """The busiest expert's share over the even share, mean over seeds. 1 is balanced; with E
        experts, E means that one does everything."""
        loads = [self.load(layer, i, run) for run in range(len(self.runs))]
        return mean(max(load) * len(load) for load in loads)


class Spread:
    """A proportion, measured for each seed. One seed has a Wilson interval, several have mean and
    standard deviation."""

    def __init__(self, proportions: list[Proportion]) -> None:
        self.proportions = proportions
        self.values = [p.value for p in proportions]
        self.mean = mean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Of one seed the 95 % Wilson interval; of several, mean ± standard deviation."""
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
