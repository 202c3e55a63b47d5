"""``ironmoe bench attacks``: several libraries run the same attack in turns. Verdicts are compared
before speeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ironmoe.attacks import Proportion
from ironmoe.bench.benchmarks.attacks.contests import (
    AttackBenchmarkSettings,
    Contest,
    contests_of,
)
from ironmoe.bench.benchmarks.attacks.libraries import PEERS, is_importable
from ironmoe.bench.benchmarks.attacks.models import (
    model_file,
    new_model,
    passes_of_training,
    trained_models,
)
from ironmoe.bench.benchmarks.attacks.time_left import (
    MOST_TIMED,
    EpochsLeft,
    TimeLeft,
    seconds_of_pass,
)
from ironmoe.bench.benchmarks.attacks.turns import is_whole, missing_turns, rows_of, take
from ironmoe.bench.common.rows.rows_file import Row, RowsFile, rows_file
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import print_table, terminal_table
from ironmoe.moe import VMoE


def run_bench_attacks(
    data: ImageData,
    settings: AttackBenchmarkSettings,
    parts: tuple[str, ...],
    folder: Path,
    console: Console,
    *,
    out: Path | None = None,
    again: bool = False,
    form: str | None = None,
) -> list[Row]:
    """Train (or load) the models and run the parts: print and keep each run of a library when it is
    over, and return the rows.

    Args:
        parts: names out of PARTS.
        folder: where the trained models are kept.
        console: for all but rows in a format.
        out, again: see ``rows_file``.
        form: of the rows on standard output, see ``show_rows``.

    Raises:
        UserError: the file cannot be used.
    """
    torch.set_flush_denormal(True)
    contests = [contest for part in parts for contest in contests_of(part, settings)]
    rounds = {contest.place: contest.rounds for contest in contests}
    asked = [contest.key(library) for contest in contests for library in contest.runs]

    def is_finished(row: Row) -> bool:
        return bool(row["runs"] >= rounds.get(f"{row['attack']} on the {row['model']}", 0))

    of = settings._asdict() | {"data": data.name, "checksum": data.checksum}
    with rows_file(
        "bench attacks",
        of,
        out=out,
        asked=asked,
        again=again,
        is_finished=is_finished,
        is_whole=is_whole,
    ) as kept:
        console.print(kept.greeting, highlight=False, markup=False, soft_wrap=True)
        _measure(contests, data, settings, folder, kept, console)
        for contest in contests:
            if form is None:
                print_table(_table(list(rows_of(contest, kept)), contest), console)
        rows = [row for contest in contests for row in rows_of(contest, kept)]

    if form is not None:
        show_rows(rows, form, lambda rows: Table(), console)
    measured = {row["library"] for row in rows}
    absent = [name for name in PEERS if name not in measured and not is_importable(name)]
    if absent:
        console.print(f"Not installed here, so not measured: {', '.join(absent)}.", highlight=False)
    return rows


def _measure(
    contests: Sequence[Contest],
    data: ImageData,
    settings: AttackBenchmarkSettings,
    folder: Path,
    kept: RowsFile,
    console: Console,
) -> None:
    """Make every run that is missing."""
    turns = [turn for contest in contests for turn in missing_turns(contest, kept)]
    if not turns:
        return
    names = list(dict.fromkeys(turn.contest.model for turn in turns))
    models = _trained(names, data, settings, folder, console)
    test = data.split()[1]
    images, labels = data.images[test], data.labels[test]
    left = TimeLeft(turns, models, images[: settings.batch_size], len(images))
    console.print(
        f"{counted(len(turns), 'run')} to make: {left.in_words()} if every image holds, and less "
        "where images fall.",
        highlight=False,
        soft_wrap=True,
    )
    for turn in turns:
        x, y = images[: turn.contest.images], labels[: turn.contest.images]
        console.print(f"{turn.label}, {len(y)} images …", highlight=False, soft_wrap=True)
        seconds = take(turn, models[turn.contest.model], x, y, kept)
        left.note(turn, seconds)
        more = f"; {len(left.turns)} left, {left.in_words()}" if left.turns else ""
        console.print(f"  {seconds:.2f} s{more}", highlight=False)


def _trained(
    names: Sequence[str],
    data: ImageData,
    settings: AttackBenchmarkSettings,
    folder: Path,
    console: Console,
) -> dict[str, VMoE]:
    """The models. Say before and after each epoch how long the trainings will take."""
    eps, epochs = settings.eps, settings.epochs
    rows, _ = data.split()
    few = data.images[rows[: settings.batch_size]][:MOST_TIMED]
    seconds = {
        name: seconds_of_pass(new_model(name, data), few) * len(rows) * passes_of_training(name)
        for name in names
        if not model_file(name, data, eps, epochs, folder).exists()
    }
    left = EpochsLeft(seconds, epochs)
    if seconds:
        console.print(
            f"{counted(len(seconds), 'model')} to train first: {left.in_words()}.", highlight=False
        )

    def say(name: str, epoch: int) -> None:
        left.note(name, epoch)
        more = f"; {left.in_words()} of training left" if left.in_words() else ""
        console.print(f"{name}: epoch {epoch} of {epochs}{more}", highlight=False)

    return trained_models(names, data, eps, epochs, folder, say)


def _table(rows: Sequence[Any], contest: Contest) -> Table:
    columns = ("library", "robust accuracy", "same verdict", "seconds", f"time / {contest.base}")
    table = terminal_table(columns, title=contest.place)
    for row in rows:
        share = Proportion(row["robust"]["count"], row["robust"]["total"])
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "verdicts differ"
        table.add_row(
            row["library"],
            str(share),
            f"{100 * row['agreement']:.1f} %",
            f"{row['seconds']:.2f}",
            ratio,
        )

    return table
