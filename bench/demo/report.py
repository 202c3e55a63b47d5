"""The report of the demo: report.html, report.json and the pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.demo import plots
from ironmoe.bench.demo.check_rows import check_rows
from ironmoe.bench.demo.comparison import AT_CHANCE, DOUBTFUL, state
from ironmoe.bench.demo.table import columns, routing_columns, routing_rows, rows
from ironmoe.bench.demo.verdict import verdict
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.page import write_report


def write_demo_report(
    folder: Path,
    models: list[ModelResults],
    examples: dict[str, dict[str, Tensor]],
    *,
    title: str,
    attack: str,
    settings: dict[str, Any],
    classes: list[str],
    device: torch.device,
) -> None:
    """Write report.json, the PNGs and report.html into ``folder``.

    Args:
        examples: for each model's name, the images that fell, of ``measure_robust``.
        attack: the attack in one line.
    """
    lead, *others = verdict(models)
    numbers = {
        "title": title,
        "attack": attack,
        "settings": settings,
        "versions": versions(),
        "device": describe_device(device),
        "verdict": [lead, *others],
        "models": {model.name: model.runs for model in models},
    }
    doubtful = {AT_CHANCE, DOUBTFUL}

    write_report(
        folder,
        numbers,
        plots.draw_all(models, examples, classes, settings["attack"]["norm"]),
        room="demo",
        lead=lead,
        doubt=any(state(model) in doubtful for model in models),
        words=others,
        images=models[0].runs[0]["clean"]["total"],
        columns=columns(models),
        rows=[[row.label, *row.cells, row.difference] for row in rows(models)],
        routing=[(m.name, routing_columns(m), routing_rows(m)) for m in models if m.layers],
        check_columns=["check", *(model.name for model in models), "what it means"],
        checks=check_rows(models),
    )
