"""Runs that one table may hold: those in one norm, on the same images of the same data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ironmoe.attacks.results.outcomes import WORST_CASE
from ironmoe.attacks.results.rows_file import Row
from ironmoe.bench.compare.finished_run import FinishedRun, told_apart
from ironmoe.bench.reports.cells import counted


class Group(NamedTuple):
    """One table.

    title: norm, data and number of images
    notes: what differs between its runs, in sentences
    rows: of ``accuracies``, with "data", "norm", "image_set", "complete" and "run"
    """

    title: str
    notes: list[str]
    rows: list[Row]


def grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    """The tables of these runs, in the order in which their first runs are given."""
    names = told_apart(runs)
    groups: dict[tuple[str, str, str], list[tuple[str, FinishedRun]]] = {}
    for name, run in zip(names, runs, strict=True):
        groups.setdefault((run.norm, run.data, run.image_set()), []).append((name, run))
    titles = [f"{norm}, {data}" for norm, data, _ in groups]
    return [
        _group(key, members, titles.count(f"{key[0]}, {key[1]}") > 1)
        for key, members in groups.items()
    ]


def _group(
    key: tuple[str, str, str], members: Sequence[tuple[str, FinishedRun]], same_title: bool
) -> Group:
    norm, data, image_set = key
    labels, notes = _labels(members)
    rows = []
    for number, (name, run) in enumerate(members):
        unfinished = " (unfinished)" if run.unfinished else ""
        about = {
            "model": f"{name}{unfinished}",
            "image_set": image_set,
            "complete": not run.unfinished,
            "run": str(run.path),
        }
        rows += [
            row | about | {"attack": labels[number].get(row["attack"], row["attack"])}
            for row in run.accuracies()
        ]
        for attack, why in run.untried.items():
            notes.append(f"{name}: {attack} could find nothing, since {why}.")
        if unfinished:
            notes.append(f"{name} is unfinished: {run.unfinished}. Its accuracies are ranges.")
    images = max(row["images"] for row in rows)
    other = f", image set {image_set}" if same_title else ""
    return Group(f"{norm}, {data}, {counted(images, 'image')}{other}", notes, rows)


def _labels(
    members: Sequence[tuple[str, FinishedRun]],
) -> tuple[list[dict[str, str]], list[str]]:
    """(of each run, attack → what its line is called; what differs)."""
    strengths = [run.strength() for _, run in members]
    labels: list[dict[str, str]] = [{} for _ in members]
    notes = []

    for attack in dict.fromkeys(name for strength in strengths for name in strength):
        own = {i: strength[attack] for i, strength in enumerate(strengths) if attack in strength}
        keys = dict.fromkeys(key for settings in own.values() for key in settings)
        differing = [k for k in keys if len({str(one.get(k)) for one in own.values()}) > 1]
        if differing:
            notes.append(f"{attack} is not the same attack in all runs: {', '.join(differing)}.")
            for number, settings in own.items():
                labels[number][attack] = f"{attack} ({_told(settings, differing)})"

    if len({tuple(strength) for strength in strengths}) > 1:
        notes.append("The worst case is over other attacks in each run.")
        for number, strength in enumerate(strengths):
            labels[number][WORST_CASE] = f"{WORST_CASE} of {', '.join(strength)}"
    if len({tuple(run.settings["attacks"]["eps_255"]) for _, run in members}) > 1:
        notes.append("The runs have other radii: -- stands where a run has none.")
    return labels, notes


def _told(settings: dict[str, Any], keys: Sequence[str]) -> str:
    values = {key: settings.get(key) for key in keys}
    return ", ".join(
        f"{key} {'default' if value is None else value}" for key, value in values.items()
    )
