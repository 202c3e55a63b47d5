"""The files that ``ironmoe attack`` writes: report.html and report.json with every number,
images.npz with the verdict on every image, and the tables of ``saved/tables.py``."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ironmoe.bench.attack.curves import distance_label
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.pictures import draw_evaluation
from ironmoe.bench.attack.rows import COST_COLUMNS, RESULT_COLUMNS
from ironmoe.bench.attack.saved.tables import write_tables
from ironmoe.bench.attack.table import costs, results
from ironmoe.bench.attack.words import words
from ironmoe.bench.common.files import write_atomically
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.radii import exact, told
from ironmoe.bench.reports.cells import brackets, counted, percent
from ironmoe.bench.reports.page import write_report
from ironmoe.bench.reports.tables import entries, headers


def write_evaluation(
    folder: Path,
    outcome: EvaluationOutcome,
    settings: dict[str, Any],
    device: torch.device,
    world: int,
) -> None:
    """Write report.json, images.npz, the tables, the PNGs and report.html into ``folder``.

    world: how many processes took part.
    """
    numbers = _numbers(outcome, settings, device, world)
    write_atomically(folder / "images.npz", verdicts(outcome))
    write_tables(folder, outcome)

    write_report(
        folder,
        numbers,
        draw_evaluation(outcome),
        room="attack",
        words=numbers["words"],
        outcome=outcome,
        distance_label=distance_label(outcome.suite.norm),
        result_columns=headers(RESULT_COLUMNS),
        results=results(outcome),
        cost_columns=headers(COST_COLUMNS),
        costs=costs(outcome),
        stages={name: counts for name, counts in numbers["stages"].items() if counts},
        percent=percent,
        brackets=brackets,
        counted=counted,
        exact=exact,
    )


def _numbers(
    outcome: EvaluationOutcome, settings: dict[str, Any], device: torch.device, world: int
) -> dict[str, Any]:
    """The content of report.json."""
    attacks = outcome.report.attacks
    return {
        "title": outcome.title,
        "attacks": outcome.description,
        "parts": {
            name: [part.as_dict() for part in parts] for name, parts in outcome.parts.items()
        },
        "eps_255": list(outcome.suite.eps_255),
        "eps": f"{outcome.suite.norm}: {told(outcome.suite.eps_255)}",
        "settings": settings,
        "versions": versions(),
        "device": describe_device(device),
        "processes": world,
        "seconds": outcome.report.seconds,
        "images": {"asked": len(outcome.images), "reached": outcome.reached},
        "pixels": outcome.images.pixels,
        "unread": {str(number): why for number, why in sorted(outcome.unread.items())},
        "seconds_waited_for_images": outcome.waited,
        "notes": outcome.images.notes,
        "words": words(outcome),
        "worst_case": [entries(RESULT_COLUMNS, row) for row in outcome.worst_rows],
        "costs": {name: entries(COST_COLUMNS, outcome.cost(name)) for name in attacks},
        "stages": {name: outcome.stages(name) for name in attacks},
        "report": outcome.report.as_dict(),
        "routing": outcome.routing,
    }


def verdicts(outcome: EvaluationOutcome) -> bytes:
    """An .npz with an entry for each image that was reached.

    index: its number among the attacked images
    row: its place in the data, counted from 0 (in a folder: class by class, files by name)
    label: its class, as the number of the logit
    clean_correct: bool, whether the clean image was classified right
    ATTACK/fell_at: the eps in units of 1/255, infinity if it held, 0 if it was wrong from the start
    ATTACK/decided: bool, whether the attack had nothing left to do
    ATTACK/prediction: the class of its final image
    ATTACK/distance: of its final image, in units of the pixel range
    ATTACK/steps: queries to the model before its final image, −1 if it did not fall
    """
    arrays: dict[str, Any] = {
        "index": outcome.index.numpy(),
        "row": outcome.rows_of_data[outcome.index].numpy(),
        "label": outcome.labels.numpy(),
        "clean_correct": outcome.report.clean_correct.numpy(),
    }
    for name, summary in outcome.report.attacks.items():
        columns = {
            key: getattr(summary, key) for key in ("decided", "prediction", "distance", "steps")
        }
        columns["fell_at"] = outcome.fell_at_255(name)
        arrays |= {f"{name}/{key}": column.numpy() for key, column in columns.items()}

    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
