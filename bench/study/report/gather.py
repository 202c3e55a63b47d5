"""From a study to the facts of its report."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ironmoe.bench.common.checkpoints import count_flops, load_checkpoint
from ironmoe.bench.common.machine.hardware import processor
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.bench.study.report.facts import ArmFacts, StudyFacts
from ironmoe.bench.study.work.collected import Collected
from ironmoe.bench.study.work.tasks import Study
from ironmoe.bench.study.work.worker import Task

CPU = torch.device("cpu")


def study_facts(
    study: Study,
    kept: Collected,
    *,
    command: str = "",
    sessions: Sequence[dict[str, Any]] = (),
) -> StudyFacts:
    """What is there of a study. Nothing is trained or measured: the file of each model that is
    trained is read, and the FLOPs of one model of each arm are counted.

    kept: of ``collected``; command: what was typed, for the page; sessions: the origin of each
        call that trained or measured.
    """
    options = study.options
    shape = tuple(study.images.shape[1:])
    arms: dict[str, ArmFacts] = {}
    notes = [*study.guesses]
    seconds = 0.0
    for task in study.tasks:
        if not task.entry.is_trained:
            continue
        model, extra = _model(task)
        # what follows the semicolon is advice, on options that a study does not have
        warnings = [text.partition(";")[0] for text in extra["training"]["warnings"]]
        notes += [f"{task.entry.name}: {text}" for text in warnings]
        seconds += extra["seconds"]
        if task.entry.arm.name not in arms:
            parameters = sum(each.numel() for each in model.parameters())
            facts = ArmFacts(task.entry.arm, count_flops(model, shape), parameters)
            arms[task.entry.arm.name] = facts

    asked = {what.name for task in study.tasks for what in task.measurements}
    every = all_measurements()
    return StudyFacts(
        data=study.data.name,
        checksum=study.data.checksum,
        classes=len(study.data.classes),
        test_images=len(study.images),
        arms=tuple(arms[arm.name] for arm in study.arms if arm.name in arms),
        budgets={task.entry.training: task.budget for task in study.tasks},
        measurements=tuple(what for name, what in every.items() if name in asked),
        not_asked=tuple(name for name in every if name not in asked),
        handed_in=options.models,
        training=None if options.models else options.training.as_dict(),
        notes=tuple(notes),
        problems=tuple(kept.problems),
        training_seconds=seconds,
        measuring_seconds=kept.seconds,
        processes=options.processes,
        command=command,
        settings=options.settings,
        versions=versions(),
        machine=processor(),
        made=tuple(sessions),
    )


def _model(task: Task) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what its training left beside the weights; nobody here has seen that of a
    model that was handed in."""
    if task.entry.file is not None:
        return load_checkpoint(task.entry.file, CPU)
    model = task.entry.get(Console(quiet=True))
    return model, {"seconds": 0.0, "training": {"warnings": []}}
