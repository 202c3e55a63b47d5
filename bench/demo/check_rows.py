"""The checks against false security of both models, as rows of one table."""

from typing import Any

from ironmoe.bench.reports.model_results import STATES, ModelResults

NOT_RUN = "–"
Check = dict[str, Any]


def check_rows(models: list[ModelResults]) -> list[tuple[str, list[str]]]:
    """(the worst state, cells: the check, its state for each model, what it means) for each check,
    the worst first."""
    of_models = [{flag["name"]: flag for flag in model.checks} for model in models]
    names = dict.fromkeys(name for checks in of_models for name in checks)
    rows = [_row(name, models, [checks.get(name) for checks in of_models]) for name in names]
    return sorted(rows, key=lambda row: STATES.index(row[0]))


def _row(name: str, models: list[ModelResults], flags: list[Check | None]) -> tuple[str, list[str]]:
    worst = min((flag["state"] for flag in flags if flag), key=STATES.index)
    cells = [flag["state"] if flag else NOT_RUN for flag in flags]

    messages = {
        model.name: flag["message"] for model, flag in zip(models, flags, strict=True) if flag
    }
    texts = set(messages.values())
    if len(texts) == 1:
        return worst, [name, *cells, texts.pop()]
    return worst, [name, *cells, " ".join(f"{who}: {text}" for who, text in messages.items())]
