"""The numbers of a run, over seeds: the one structure that table, pictures and report.json are made
from."""

import math
from statistics import mean, stdev
from typing import Any

from ironmoe.attacks import Proportion


class ModelResults:
    """What was measured of one architecture. ``runs[s]`` is the dictionary of seed number s (see
    ``bench/demo.py``)."""

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
        low, high = self.interval
        if len(self.values) == 1:
            return f"{100 * self.mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        spread = f"{100 * self.mean:.1f} ± {100 * stdev(self.values):.1f} %"
        return f"{spread} [{100 * min(self.values):.1f}, {100 * max(self.values):.1f}]"


def _proportion(stored: dict[str, Any]) -> Proportion:
    return Proportion(stored["count"], stored["total"])


def verdict(models: list[ModelResults]) -> list[str]:
    """What the numbers show and what they cannot, in words."""
    seeds = len(models[0].runs)
    lines = []
    if len(models) == 2:
        lines.append(_comparison(models[0], models[1]))
    if seeds == 1:
        lines.append(
            "This is one seed. The intervals are 95 % Wilson intervals: how precisely the test "
            "images measure these very weights. "
            "They say nothing of another training run, which can move robust accuracy by more "
            "than the interval is wide. One seed "
            "can show that an attack works, how far routing moves, and what a model costs; it "
            "cannot show that one architecture is "
            "more robust than another. Use --seeds 5 for that."
        )
    else:
        lines.append(
            f"Mean ± standard deviation over {seeds} seeds, each a training of its own, smallest "
            "and largest in brackets; every "
            "seed sees the same data split. "
            + (
                "Two seeds show that results vary, not by how much."
                if seeds == 2
                else "A difference counts where it has the same sign in every seed and exceeds "
                "the spread."
            )
        )
    lines.append(
        "Robust accuracy is an upper bound: it is what this attack left standing. A stronger "
        "attack, more steps or more restarts "
        "can only lower it."
    )
    return lines


def _comparison(a: ModelResults, b: ModelResults) -> str:
    parts = []
    for i, eps in enumerate(a.eps):
        x, y = a.robust(i), b.robust(i)
        differences = [100 * (p - q) for p, q in zip(x.values, y.values, strict=True)]
        if len(differences) == 1:
            apart = x.interval[0] > y.interval[1] or y.interval[0] > x.interval[1]
            note = "intervals apart" if apart else "intervals overlap"
        else:
            higher = sum(d > 0 for d in differences)
            note = f"{a.name} higher in {higher} of {len(differences)} seeds"
        parts.append(
            f"{round(mean(differences), 1) + 0.0:+.1f} points at eps {exact(eps)}/255 ({note})"
        )
    return f"Robust accuracy of {a.name} minus {b.name}: " + ", ".join(parts) + "."


def exact(number: float) -> str:
    """As short as it can be without being another number: what has this label, or this file, is
    this number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def speed(rate: float) -> str:
    """Of so many a second, the digits that matter."""
    return f"{rate:{'.0f' if rate >= 100 else '.3g'}}"


def finite(value: Any) -> Any:
    """The same structure with NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
