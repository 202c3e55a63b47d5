"""The files that ``ironmoe attack`` writes: report.html and report.json with every number,
and what ``saved/tables.py`` writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ironmoe.bench.attack.curves import distance_label
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.pictures import draw_evaluation
from ironmoe.bench.attack.rows import COST_COLUMNS, RESULT_COLUMNS
from ironmoe.bench.attack.saved.tables import write_tables
from ironmoe.bench.attack.table import costs, results
from ironmoe.bench.attack.words import at_chance, images_told, told_verdict, words
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.radii import exact, told
from ironmoe.bench.reports.cells import brackets, counted, percent, value_of
from ironmoe.bench.reports.page import write_report
from ironmoe.bench.reports.tables import entries, headers


def write_evaluation(
    folder: Path,
    outcome: EvaluationOutcome,
    settings: dict[str, Any],
    device: torch.device,
    parallel: Mapping[str, int],
) -> None:
    """Write report.json, the tables, the PNGs and report.html into ``folder``.

    parallel: "processes", how many took part; "expert_parallel", how many share experts.
    """
    numbers = _numbers(outcome, settings, device, parallel)
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
        stages=_stages(outcome, numbers["stages"]),
        checks=[
            (flag.state, [flag.name, flag.state, value_of(flag), flag.message])
            for flag in outcome.checks
        ],
        percent=percent,
        brackets=brackets,
        counted=counted,
        exact=exact,
    )


def _stages(
    outcome: EvaluationOutcome, fell: dict[str, dict[str, list[int]]]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """(attack, columns, rows) of the tables of what fell to each part of an ensemble."""
    columns = ["part", *(f"eps {exact(eps)}/255" for eps in outcome.suite.eps_255)]
    tables = []
    for name, of_parts in fell.items():
        attempted = outcome.attempted(name)
        rows = [
            [part, *(_of(*pair) for pair in zip(counts, attempted[part], strict=True))]
            for part, counts in of_parts.items()
        ]
        tables.append((name, columns, rows))
    return [table for table in tables if table[2]]


def _of(fell: int, attempted: int) -> str:
    """ "3 of 14", and a dash where no image came so far."""
    return f"{fell} of {attempted}" if attempted else "–"


def _numbers(
    outcome: EvaluationOutcome,
    settings: dict[str, Any],
    device: torch.device,
    parallel: Mapping[str, int],
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
        **parallel,
        "seconds": outcome.report.seconds,
        "images": {
            "asked": len(outcome.images),
            "reached": outcome.reached,
            "counted": outcome.report.clean_accuracy.total,
            "told": images_told(outcome),
        },
        "pixels": outcome.images.pixels,
        "unread": {str(number): why for number, why in sorted(outcome.unread.items())},
        "seconds_waited_for_images": outcome.waited,
        "notes": outcome.images.notes,
        "verdict": told_verdict(outcome),
        "at_chance": bool(at_chance(outcome)),
        "words": words(outcome),
        "worst_case": [entries(RESULT_COLUMNS, row) for row in outcome.worst_rows],
        "costs": {name: entries(COST_COLUMNS, outcome.cost(name)) for name in attacks},
        "stages": {name: outcome.stages(name) for name in attacks},
        "report": outcome.report.as_dict(),
        "routing": outcome.routing,
    }
