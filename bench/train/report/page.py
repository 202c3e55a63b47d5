"""The report of a training: report.html, report.json and the pictures."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.reports.page import write_report
from ironmoe.bench.train.report.facts import TrainingFacts
from ironmoe.bench.train.report.pictures import draw_training
from ironmoe.bench.train.report.words import words


def write_training_report(
    folder: Path, facts: TrainingFacts, device: torch.device, parallel: Mapping[str, int]
) -> None:
    """Write report.json, the PNGs and report.html into ``folder``. ``parallel``: "processes", how
    many took part; "expert_parallel", how many share experts."""
    numbers = {
        "title": facts.title,
        "settings": facts.settings,
        "versions": versions(),
        "device": describe_device(device),
        **parallel,
        "words": words(facts),
        "figures": dict(facts.rows),
        **facts.training,
        "attack": None
        if facts.attack is None
        else {
            "clean": facts.attack["report"]["clean"],
            "worst_case": facts.attack["worst_case"],
            "at_chance": facts.attack.get("at_chance", False),
        },
    }
    write_report(
        folder,
        numbers,
        draw_training(facts),
        room="train.report",
        words=numbers["words"],
        facts=facts,
    )
