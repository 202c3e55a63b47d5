"""What ``ironmoe attack`` writes: report.html, one self-contained file, report.json, every number, and images.npz, the verdict on every
image; and the table on the terminal."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.table import Table

from ironmoe.bench.evaluation_outcome import Outcome
from ironmoe.bench.evaluation_plots import draw_evaluation, unit_of
from ironmoe.bench.run_folder import write_atomically
from ironmoe.bench.summary import finite
from ironmoe.bench.versions import describe_device, versions

COLUMNS = (
    "attack",
    "eps/255",
    "robust accuracy",
    "fell",
    "undecided",
    "found",
    "confirmed",
    "images/s",
    "forwards",
    "backwards",
)


def write_evaluation(folder: Path, outcome: Outcome, settings: dict[str, Any], device: torch.device, world: int) -> None:
    """Write report.json, images.npz, the PNGs and report.html into ``folder``."""
    numbers = {
        "title": title(outcome),
        "attacks": outcome.suite.describe(),
        "eps_255": list(outcome.suite.eps_255),
        "settings": settings,
        "versions": versions(),
        "device": describe_device(device),
        "processes": world,
        "seconds": outcome.seconds,
        "images": {"asked": len(outcome.images), "reached": outcome.reached},
        "words": outcome.words(),
        "worst_case": [
            {"eps_255": row.eps_255, "undecided": row.undecided} | row.robust.as_dict() for row in outcome.worst_rows
        ],
        "stages": {name: outcome.stages(name) for name in outcome.report.attacks},
        "report": outcome.report.as_dict(),
        "routing": outcome.routing,
    }
    write_atomically(folder / "report.json", json.dumps(finite(numbers), indent=1, allow_nan=False))
    write_atomically(folder / "images.npz", verdicts(outcome))
    pictures = []
    for file, (heading, what, figure) in draw_evaluation(outcome).items():
        figure.savefig(folder / file, dpi=130)
        plt.close(figure)
        pictures.append((heading, what, base64.b64encode((folder / file).read_bytes()).decode()))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ironmoe.bench", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("evaluation.html.jinja").render(
        numbers=numbers,
        outcome=outcome,
        columns=COLUMNS,
        groups=table_groups(outcome),
        stages={name: counts for name in outcome.report.attacks if (counts := outcome.stages(name))},
        pictures=pictures,
        unit=unit_of(outcome.suite.norm),
        percent=lambda share: f"{100 * share.value:.1f} %",
        interval=lambda share: "[{:.1f}, {:.1f}]".format(*(100 * end for end in share.interval())),
        settings=[(key, json.dumps(value)) for key, value in settings.items()],
    )
    write_atomically(folder / "report.html", html)


def verdicts(outcome: Outcome) -> bytes:
    """An .npz: ``clean_correct`` of each image reached, in the order of the data, and under ATTACK/… ``fell_at``, the eps in units of 1/255
    (infinity if it held, 0 if it was wrong from the start), and ``decided``, ``prediction``, ``distance`` and ``steps`` of its final image."""
    arrays: dict[str, Any] = {"clean_correct": outcome.report.clean_correct.numpy()}
    for name, summary in outcome.report.attacks.items():
        columns = {key: getattr(summary, key) for key in ("decided", "prediction", "distance", "steps")}
        columns["fell_at"] = 255 * summary.fell_at
        arrays |= {f"{name}/{key}": column.numpy() for key, column in columns.items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def title(outcome: Outcome) -> str:
    return f"{outcome.name} under attack in {outcome.suite.norm}"


def table_groups(outcome: Outcome) -> list[tuple[str, list[list[str]], list[str]]]:
    """(attack, a list of cells for each eps, cells of the attack as a whole), the worst case per sample last."""
    groups = []
    names = list(outcome.report.attacks)
    for name in [*names, ""] if len(names) > 1 else names:
        rows = [
            [f"{row.eps_255:g}", str(row.robust), str(row.fell), str(row.undecided)]
            for row in outcome.rows
            if row.attack == name
        ]
        cells = ["", "", "", "", ""]
        if name:
            cost = outcome.cost(name)
            cells = [
                str(cost.found),
                str(cost.confirmed),
                f"{cost.images_per_second:{'.0f' if cost.images_per_second >= 100 else '.3g'}}",
                str(cost.forwards),
                str(cost.backwards),
            ]
        groups.append((name or "worst case", rows, cells))
    return groups


def results_table(outcome: Outcome) -> Table:
    """For the terminal."""
    heading = f"{title(outcome)}: {outcome.suite.describe()}\nclean accuracy {outcome.report.clean_accuracy}"
    table = Table(*COLUMNS, title=heading, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rows, cells in table_groups(outcome):
        for number, row in enumerate(rows):
            table.add_row(*([name, *row, *cells] if number == 0 else ["", *row, *[""] * len(cells)]))
        table.add_section()
    return table
