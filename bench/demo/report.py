"""The report of the demo: report.html, report.json and the pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.demo import plots
from ironmoe.bench.demo.table import rows
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
    shown_eps: float,
) -> None:
    """Write report.json, the PNGs and report.html into ``folder``.

    Args:
        examples: for each model's name, the images of ``measure_routing``.
        attack: the attack in one line.
        shown_eps: of the examples, in units of 1/255.
    """
    numbers = {
        "title": title,
        "attack": attack,
        "settings": settings,
        "versions": versions(),
        "device": describe_device(device),
        "verdict": verdict(models),
        "models": {model.name: model.runs for model in models},
    }

    write_report(
        folder,
        numbers,
        plots.draw_all(models, examples, classes, shown_eps),
        room="demo",
        words=numbers["verdict"],
        images=models[0].runs[0]["clean"]["total"],
        names=[model.name for model in models],
        rows=rows(models),
        has_routing=any(model.layers for model in models),
    )
