"""``ironmoe compare``: two runs on the same images, line by line."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ironmoe.attacks import ComparedAccuracy, Comparison, compare
from ironmoe.attacks.results.better import from_to
from ironmoe.attacks.results.comparison import difference_told
from ironmoe.bench.common.files import finite
from ironmoe.bench.compare.better import attack_name, better, radius_in_255, same_run, untried
from ironmoe.bench.compare.finished_run import STRENGTH, FinishedRun, RunError, finished_run
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.tables import Column, cells, headers, print_table, terminal_table

COLUMNS: tuple[Column[ComparedAccuracy], ...] = (
    Column("attack", lambda line: attack_name(line.attack)),
    Column("eps", lambda line: "" if line.eps is None else radius_in_255(line.eps)),
    Column("first", lambda line: _percent(*line.ends[0])),
    Column("second", lambda line: _percent(*line.ends[1])),
    Column("difference", lambda line: _difference(line)),
    Column("p", lambda line: f"{line.result.p_value:.2g}"),
)
NAMES = {"names": "attacks", "eps_255": "eps/255", "alpha_255": "alpha/255"}
UNDECIDED: Column[ComparedAccuracy] = Column("undecided", lambda line: str(line.undecided))


def run_compare_command(
    one: Path, other: Path, *, confidence: float, as_json: bool, console: Console
) -> Comparison:
    """Compare two finished runs, and print a table, or JSON.

    Raises:
        RunError: a folder holds no such run, or the runs cannot be compared.
    """
    runs = [finished_run(path) for path in (one, other)]
    norms = [run.settings["attacks"]["norm"] for run in runs]
    if norms[0] != norms[1]:
        raise RunError(
            f"{one} and {other} must be attacked in the same norm, got {norms[0]} and {norms[1]}"
        )
    without = _told_otherwise(runs)
    try:
        first, second = (run.outcomes(without=without) for run in runs)
        comparison = compare(first, second, confidence=confidence)
    except ValueError as error:
        names = [f"{run.path} ({run.data})" for run in runs]
        raise RunError(f"{names[0]}, {names[1]}: {error}") from error

    if as_json:
        console.out(json.dumps(finite(_entry(runs, comparison)), indent=1), highlight=False)
    else:
        _print(runs, comparison, console)
    return comparison


def _entry(runs: list[FinishedRun], comparison: Comparison) -> dict[str, Any]:
    names = ("one", "other")
    about: dict[str, dict[str, Any]] = {
        name: {"folder": str(run.path), "model": run.name, "attacks": run.report["attacks"]}
        for name, run in zip(names, runs, strict=True)
    }
    for name, run in zip(names, runs, strict=True):
        about[name]["checks"] = run.checks
    found = comparison.as_dict()
    found["notes"] = [*same_run(runs), *untried(runs), *found["notes"]]
    sentences = {"sentences": better(runs, comparison)}
    return about | {"other_settings": _other_settings(runs)} | sentences | found


def _print(runs: list[FinishedRun], comparison: Comparison, console: Console) -> None:
    for number, run in zip(("first", "second"), runs, strict=True):
        _say(f"{number}: {run.report['title']}, {run.path}; {run.checks}", console)

    for sentence in same_run(runs):
        _say(sentence, console)

    open_ = any(line.undecided for line in comparison.lines)
    columns = (*COLUMNS, UNDECIDED) if open_ else COLUMNS
    table = terminal_table(headers(columns))
    for line in comparison.lines:
        table.add_row(*cells(columns, line))
    print_table(table, console)

    result = comparison.lines[0].result
    tests = " or ".join(dict.fromkeys(line.result.test for line in comparison.lines))
    _say(
        f"On {counted(result.images, 'image')}. Accuracies are in percent, differences in points, "
        f"first minus second, with {100 * result.confidence:g} % intervals for paired data (Bonett "
        f"and Price, 2012). p is that of {tests}, two-sided, for each line alone.",
        console,
    )
    for sentence in better(runs, comparison):
        _say(sentence, console)
    if open_:
        _say(
            "Ranges are from where all undecided images fall to where all hold. Intervals and p "
            "allow for every way in which they may turn out.",
            console,
        )
    for note in [*untried(runs), *comparison.notes]:
        _say(note, console)
    if others := _other_settings(runs):
        _say(
            f"The runs differ in more than the model (first and second): {'; '.join(others)}.",
            console,
        )


def _told_otherwise(runs: list[FinishedRun]) -> tuple[str, ...]:
    """What differs in two runs on the same images of one set, because each model has its own: the
    order of its classes, which labels count in; and its preprocessing, which makes its pixels."""
    one, other = (run.settings for run in runs)
    places = [run.places() for run in runs]
    common = places[0].keys() & places[1].keys()
    is_one_set = one.get("checksum") and one["checksum"] == other.get("checksum")
    if not is_one_set or any(places[0][number] != places[1][number] for number in common):
        return ()
    if one.get("preprocessing") != other.get("preprocessing"):
        return ("label", "checksum")
    # A checksum is that of the pixels and of the label together.
    return ("label", "checksum") if one.get("classes") != other.get("classes") else ()


def _other_settings(runs: list[FinishedRun]) -> list[str]:
    """Where the attacks and the versions of the runs differ."""
    one, other = (run.settings["attacks"] for run in runs)
    pairs = {NAMES.get(key, key): (one.get(key), other.get(key)) for key in {**one, **other}}
    strengths = [run.strength() for run in runs]
    for attack in [name for name in strengths[0] if name in strengths[1]]:
        first, second = (strength[attack] for strength in strengths)
        pairs |= {
            f"{attack} {key}": (first.get(key), second.get(key))
            for key in {**first, **second}
            if key not in STRENGTH and key not in one
        }
    pairs["ironmoe"] = runs[0].settings["ironmoe"], runs[1].settings["ironmoe"]
    pairs["pixels"] = runs[0].report.get("pixels"), runs[1].report.get("pixels")
    return [f"{name}: {_told(a)} and {_told(b)}" for name, (a, b) in pairs.items() if a != b]


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return "the default" if value is None else str(value)


def _difference(line: ComparedAccuracy) -> str:
    low, high = (100 * end for end in line.result.interval)
    if not line.result.images:
        return "–"
    return f"{difference_told(line)} [{low:+.1f}, {high:+.1f}]"


def _percent(least: float, most: float) -> str:
    return "–" if most != most else from_to(least, most).removesuffix(" %")


def _say(line: str, console: Console) -> None:
    console.print(line, highlight=False, markup=False)
