"""What a study is asked to do."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.ladder.training import TRAININGS, TrainingSettings
from ironmoe.bench.study.measure.budget import Budget, robust_budget
from ironmoe.bench.study.measure.table import usual_measurements
from ironmoe.bench.train.recipe import STANDARD

SEEDS = 8
QUICK_ARMS, QUICK_SEEDS, QUICK_TRAININGS = ("dense", "E8", "E32"), 3, (STANDARD,)
"""What ``--quick`` takes where the user says nothing else."""


@dataclass(frozen=True)
class StudyOptions:
    """data: of which the test images are asked about; arms: names in LADDER; trainings: among
    TRAININGS; seeds: how many; first_seed: the first of them; models: handed in, as ``--model`` has
    them, in place of the ladder; measurements: their names; processes: how many work, each on
    a model of its own; expert_parallel: how many work on one model together, under torchrun, where
    ``processes`` says nothing; out: the folder, None for one named after the settings."""

    data: ImageData
    arms: tuple[str, ...] = tuple(LADDER)
    trainings: tuple[str, ...] = TRAININGS
    seeds: int = SEEDS
    first_seed: int = 0
    models: tuple[str, ...] = ()
    training: TrainingSettings = field(default_factory=TrainingSettings)
    budget: Budget = field(default_factory=Budget)
    measurements: tuple[str, ...] = field(default_factory=usual_measurements)
    processes: int = 1
    expert_parallel: int = 1
    out: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What makes a folder that of this study. Arms, seeds and measurements may be added to it
        later; they only say how much of it is done."""
        return {
            "data": self.data.name,
            "checksum": self.data.checksum,
            "training": None if self.models else self.training.as_dict(),
            "models": list(self.models),
        }

    def budget_of(self, training: str) -> Budget:
        """Models that were trained to be robust are attacked at larger radii."""
        if self.models or training == STANDARD:
            return self.budget
        return robust_budget(self.budget, self.training.eps_255)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
