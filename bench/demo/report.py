"""report.html, one self-contained file, and report.json, every number."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from ironmoe.bench.common.results import ModelResults, finite, verdict
from ironmoe.bench.common.run_folder import write_atomically
from ironmoe.bench.common.versions import describe_device, versions
from ironmoe.bench.demo import plots
from ironmoe.bench.demo.table import rows


def write_report(
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
    """Write report.json, the PNGs and report.html into ``folder``."""
    numbers = {
        "title": title,
        "attack": attack,
        "settings": settings,
        "versions": versions(),
        "device": describe_device(device),
        "verdict": verdict(models),
        "models": {model.name: model.runs for model in models},
    }
    write_atomically(folder / "report.json", json.dumps(finite(numbers), indent=1, allow_nan=False))
    pictures = plots.draw_all(models, examples, classes, shown_eps, folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ironmoe.bench.demo", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )
    html = environment.get_template("report.html.jinja").render(
        title=title,
        attack=attack,
        images=models[0].runs[0]["clean"]["total"],
        data=settings["data"],
        checksum=settings["checksum"],
        versions=numbers["versions"],
        device=numbers["device"],
        verdict=numbers["verdict"],
        names=[model.name for model in models],
        rows=rows(models),
        pictures=[
            (name, base64.b64encode(file.read_bytes()).decode()) for name, file in pictures.items()
        ],
        has_routing=any(model.layers for model in models),
        routing_images=settings["attack"]["routing_images"],
        settings=[(key, json.dumps(value)) for key, value in settings.items()],
    )
    write_atomically(folder / "report.html", html)
