"""Runs of a study that nobody trained, with effects that are known."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ironmoe.bench.study.ladder.arms import LADDER, Arm
from ironmoe.bench.study.statistics.measured import Measured

SHARED, RESIDUAL = 7.8, 3.6
"""Standard deviations of accuracy at 8/255, in points, over seeds: what all models of a seed have
in common, and what each has of its own, as a pilot of trained models measured them."""


def arms(*names: str) -> list[Arm]:
    return [LADDER[name] for name in names]


def accuracies(
    of: Sequence[Arm],
    seeds: int,
    rng: np.random.Generator,
    points: Callable[[Arm], float] = lambda arm: 60.0,
    *,
    shared: float = SHARED,
    residual: Callable[[Arm], float] = lambda arm: RESIDUAL,
    images: int = 500,
    name: str = "auc",
) -> list[Measured]:
    """One accuracy a run: its arm's points, what its seed adds to all arms, what it adds of its
    own, and the chance of being measured on so many images."""
    of_seed = rng.normal(0, shared, seeds)
    own = rng.normal(size=(seeds, len(of))) * [residual(arm) for arm in of]
    means = np.array([points(arm) for arm in of])
    p = np.clip((means + of_seed[:, None] + own) / 100, 0, 1)
    shares = rng.binomial(images, p) / images
    return [
        Measured(arm.name, "standard", seed, {name: float(shares[seed, place])}, {})
        for seed in range(seeds)
        for place, arm in enumerate(of)
    ]


def positive(
    of: Sequence[Arm],
    seeds: int,
    rng: np.random.Generator,
    factor: Callable[[Arm], float] = lambda arm: 1.0,
    *,
    shared: float = 0.3,
    residual: float = 0.15,
    name: str = "r1",
) -> list[Measured]:
    """One number a run: its arm's factor, times what its seed and the run itself add."""
    logs = rng.normal(0, shared, (seeds, 1)) + rng.normal(0, residual, (seeds, len(of)))
    return [
        Measured(
            arm.name, "standard", seed, {name: factor(arm) * float(np.exp(logs[seed, place]))}, {}
        )
        for seed in range(seeds)
        for place, arm in enumerate(of)
    ]


def changes(
    arm: Arm,
    seeds: int,
    rng: np.random.Generator,
    points: Mapping[str, float],
    *,
    residual: float = 1.0,
) -> list[Measured]:
    """Clean accuracy under each intervention, so many points above the one without any."""
    runs = []
    for seed in range(seeds):
        own = 0.9 + rng.normal(0, 0.02)
        values = {
            f"{name}:clean": own + rng.normal(by, residual) / 100 for name, by in points.items()
        }
        runs.append(Measured(arm.name, "standard", seed, {"none:clean": own} | values, {}))
    return runs


def image_radii(
    arm: Arm,
    seeds: int,
    rng: np.random.Generator,
    slope: float = 0.0,
    *,
    images: int = 100,
    residual: float = 0.0,
) -> list[Measured]:
    """Least radii that grow with the clean margin, and by ``slope`` with the distance of the top
    experts, which grows with the margin, too; residual: how much the slopes of runs scatter."""
    runs = []
    for seed in range(seeds):
        margin = rng.normal(size=images)
        distance = margin + rng.normal(size=images)
        steepness = slope + rng.normal(0, residual)
        radius = np.exp(2 * margin + steepness * (distance - margin) + rng.normal(size=images))
        columns = {"least_eps": radius, "top_distance": np.exp(distance), "margin": margin}
        lists = {name: column.tolist() for name, column in columns.items()}
        runs.append(Measured(arm.name, "standard", seed, {}, lists))
    return runs


def together(*parts: Sequence[Measured]) -> list[Measured]:
    """The numbers of the same runs in one."""
    runs: dict[tuple[str, str, int], Measured] = {}
    for run in (run for part in parts for run in part):
        key = (run.arm, run.training, run.seed)
        old = runs.get(key, run)
        runs[key] = run._replace(values=old.values | run.values, images=old.images | run.images)
    return list(runs.values())
