"""What was measured is kept: one file for each model and measurement, whoever measured it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ironmoe.bench.common.files import slug, write_json
from ironmoe.bench.common.machine.hardware import describe_device, processor
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Measurement, Outcome

PARTS = {"values": dict, "images": dict, "problems": list, "seconds": float}
"""Of a file."""


class Store:
    """The folder of outcomes.

    A file is found by a digest of the model's weights, of the images that it is asked about, of the
    version of the measurement, and of the settings that it depends on. So another budget, other
    images or a model that was trained again are measured anew, and nothing that is still true is.
    """

    def __init__(self, folder: Path, images: str) -> None:
        """images: a checksum of the test images and labels."""
        self.folder = folder
        self.images = images

    def file(self, model: str, what: Measurement, budget: Budget) -> Path:
        """Where the outcome of a measurement of this model lies. model: a digest of it."""
        settings = budget.part(what.settings)
        key = {"images": self.images, "settings": settings, "version": what.version}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / model[:16] / f"{slug(what.name)}-{digest}.json"

    def read(self, model: str, what: Measurement, budget: Budget) -> Outcome | None:
        """None if it is still to be measured, or cannot be read."""
        found = self._content(self.file(model, what, budget))
        if found is None:
            return None
        return Outcome(_numbers(found["values"]), _rows(found["images"]), tuple(found["problems"]))

    def seconds(self, model: str, what: Measurement, budget: Budget) -> float | None:
        """How long it took; None if it was not measured."""
        found = self._content(self.file(model, what, budget))
        return None if found is None else float(found["seconds"])

    def write(
        self,
        model: str,
        what: Measurement,
        budget: Budget,
        outcome: Outcome,
        *,
        name: str,
        seconds: float,
    ) -> None:
        """Keep an outcome. name: the model's, for people; seconds: how long it took."""
        file = self.file(model, what, budget)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "model": name,
            "digest": model,
            "measurement": what.name,
            "settings": budget.part(what.settings),
            "seconds": seconds,
            "versions": versions(),
            "processor": processor(),
            "device": describe_device(torch.device("cpu")),
        }
        write_json(file, about | outcome.as_dict())

    def _content(self, file: Path) -> dict[str, Any] | None:
        """None if the file is not there, or is not what ``write`` makes."""
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and all(
            isinstance(found.get(name), kind) for name, kind in PARTS.items()
        )
        return found if whole else None


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    """JSON has null for NaN."""
    return {name: float("nan") if value is None else value for name, value in values.items()}


def _rows(images: dict[str, list[float | None]]) -> dict[str, list[float]]:
    return {
        name: [float("nan") if value is None else value for value in row]
        for name, row in images.items()
    }
