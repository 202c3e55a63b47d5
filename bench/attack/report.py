"""What ``ironmoe attack`` writes: report.html, one self-contained file, report.json, every number,
and images.npz, the verdict on every image."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from ironmoe.bench.attack.outcome import Outcome
from ironmoe.bench.attack.plots import draw_evaluation, unit_of
from ironmoe.bench.attack.table import COSTS, RESULTS, costs, results
from ironmoe.bench.common.results import exact, finite
from ironmoe.bench.common.run_folder import write_atomically
from ironmoe.bench.common.versions import describe_device, versions
from ironmoe.bench.demo.plots import save


def write_evaluation(
    folder: Path, outcome: Outcome, settings: dict[str, Any], device: torch.device, world: int
) -> None:
    """Write report.json, images.npz, the PNGs and report.html into ``folder``."""
    numbers = {
        "title": outcome.title,
        "attacks": outcome.description,
        "parts": {
            name: [part._asdict() for part in parts] for name, parts in outcome.parts.items()
        },
        "eps_255": list(outcome.suite.eps_255),
        "settings": settings,
        "versions": versions(),
        "device": describe_device(device),
        "processes": world,
        "seconds": outcome.report.seconds,
        "images": {"asked": len(outcome.images), "reached": outcome.reached},
        "matched": outcome.matched,
        "words": outcome.words(),
        "worst_case": [
            {"eps_255": row.eps_255, "undecided": row.undecided}
            | row.robust.as_dict()
            | {"wilson_95": list(row.interval)}
            for row in outcome.worst_rows
        ],
        "costs": {name: outcome.cost(name)._asdict() for name in outcome.report.attacks},
        "stages": {name: outcome.stages(name) for name in outcome.report.attacks},
        "report": outcome.report.as_dict(),
        "routing": outcome.routing,
    }
    write_atomically(folder / "report.json", json.dumps(finite(numbers), indent=1, allow_nan=False))
    write_atomically(folder / "images.npz", verdicts(outcome))
    pictures = []
    for file, (heading, what, figure) in draw_evaluation(outcome).items():
        save(figure, folder / file)
        pictures.append((heading, what, base64.b64encode((folder / file).read_bytes()).decode()))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ironmoe.bench.attack", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html.jinja").render(
        numbers=numbers,
        outcome=outcome,
        result_columns=RESULTS,
        results=results(outcome),
        cost_columns=COSTS,
        costs=costs(outcome),
        stages={
            name: counts for name in outcome.report.attacks if (counts := outcome.stages(name))
        },
        pictures=pictures,
        unit=unit_of(outcome.suite.norm),
        percent=lambda share: f"{100 * share.value:.1f} %",
        interval=lambda share: "[{:.1f}, {:.1f}]".format(*(100 * end for end in share.interval())),
        exact=exact,
        settings=[(key, json.dumps(value, ensure_ascii=False)) for key, value in settings.items()],
    )
    write_atomically(folder / "report.html", html)


def verdicts(outcome: Outcome) -> bytes:
    """An .npz with an entry for each image that was reached.

    index: its number among the attacked images; row: its place in the data, counted from 0 (in a
        folder: class by class, files by name);
    label: its class, as the number of the logit; clean_correct: bool
    ATTACK/fell_at: the eps in units of 1/255, infinity if it held, 0 if it was wrong from the start
    ATTACK/decided, ATTACK/prediction, ATTACK/distance, ATTACK/steps: whether nothing was left to
    do; of its final image the class, the distance in units of the pixel range, and the questions to
    the model before it, −1 if it did not fall
    """
    arrays: dict[str, Any] = {
        "index": outcome.index.numpy(),
        "row": outcome.rows_of_data[outcome.index].numpy(),
        "label": outcome.labels[outcome.index].numpy(),
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
