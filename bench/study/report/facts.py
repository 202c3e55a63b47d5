"""What the report says of a study beside its numbers: models, data, budgets, machine."""

from typing import Any, NamedTuple

from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Measurement


class ArmFacts(NamedTuple):
    """One architecture. flops: of the forward pass of one image, counted in the operators that run;
    parameters: how many."""

    arm: Arm
    flops: int
    parameters: int


class StudyFacts(NamedTuple):
    """What was asked and how.

    data, checksum: of the data set; classes, test_images: how many
    arms: of which a model is there, in the order of the study
    budgets: training → how much was measured of its models
    measurements: that were asked for; not_asked: the names of those that were not
    handed_in: what ``--model`` had, nothing for models of the ladder; training: the settings that
        all trainings of the ladder share, None for models that were handed in
    notes: what was noticed in trainings, one sentence each with the model in front, or how classes
        of handed-in models were guessed; problems: what could not be measured, and why
    training_seconds, measuring_seconds: sums over models, each in one process
    processes: how many worked; command: what was typed, "" if unknown
    settings: those of the folder; versions: of packages; machine: in words
    joined: the files of numbers that were put together, none for a study of its own; older: what
        was measured by an earlier version of its measurement than the one that the page describes
    made: the origin of each call that trained or measured (``provenance``); none in files of
        earlier versions
    """

    data: str
    checksum: str
    classes: int
    test_images: int
    arms: tuple[ArmFacts, ...]
    budgets: dict[str, Budget]
    measurements: tuple[Measurement, ...]
    not_asked: tuple[str, ...]
    handed_in: tuple[str, ...]
    training: dict[str, Any] | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    training_seconds: float
    measuring_seconds: float
    processes: int
    command: str
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: str
    joined: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    made: tuple[dict[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """Of the page."""
        return f"Robustness of mixtures of experts: {self.data}"

    def of_arm(self, name: str) -> ArmFacts | None:
        """None if no model of this arm is there."""
        return next((facts for facts in self.arms if facts.arm.name == name), None)
