"""``ironmoe bench training``: do what is not done yet, print each result as it comes, keep it."""

import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.training.inner import (
    DTYPES,
    LEGEND,
    InnerSettings,
    expected_seconds,
    inner_markdown,
    inner_table,
    measure_inner,
)
from ironmoe.bench.benchmarks.training.inner import are_whole as inner_are_whole
from ironmoe.bench.benchmarks.training.method_tables import (
    method_results,
    methods_markdown,
    methods_table,
    model_differences,
    run_line,
)
from ironmoe.bench.benchmarks.training.models import MODELS
from ironmoe.bench.benchmarks.training.runs import (
    VARIANTS,
    Run,
    StudySettings,
    are_whole,
    do,
    expected_ends,
)
from ironmoe.bench.benchmarks.training.steps import PEER, has_peer
from ironmoe.bench.common.durations import in_words, range_in_words
from ironmoe.bench.common.files import write_atomically, write_json
from ironmoe.bench.common.machine.origin import origin_digest
from ironmoe.bench.common.rows.kept import Kept, begin_copy
from ironmoe.bench.common.rows.remaining import Remaining
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import print_table

PARTS = ("inner", "methods")
MARKDOWN = "table.md"
Row = dict[str, Any]


class TrainingBenchmark(NamedTuple):
    """What is measured. parts: of PARTS; models: of MODELS; dtypes: of DTYPES, for the part
    ``inner``; methods: of VARIANTS, and seeds, for the part ``methods``."""

    parts: Sequence[str] = PARTS
    models: Sequence[str] = ("v-moe", "vit")
    dtypes: Sequence[str] = tuple(DTYPES)
    methods: Sequence[str] = tuple(VARIANTS)
    seeds: Sequence[int] = (0, 1, 2, 3)
    inner: InnerSettings = InnerSettings()
    study: StudySettings = StudySettings()


def run_bench_training(
    benchmark: TrainingBenchmark,
    data: ImageData,
    folder: Path,
    out: Path | None,
    console: Console,
    form: str | None = None,
) -> list[Row]:
    """Measure the parts, and return their rows.

    Args:
        folder: where every finished piece of work is kept, and trained weights with it. Several
            processes may share it, each with other seeds. The times of the part ``inner`` lie in a
            folder for this machine and these versions.
        out: file for all rows, as JSON; it is written anew after each piece of work.
        form: of the rows on standard output, see ``show_rows``.

    Raises:
        UserError: the folder holds work that was done with other settings, or the file cannot be
            used.
    """
    torch.set_flush_denormal(True)
    parts = {part: _kept(part, benchmark, data, folder) for part in benchmark.parts}
    found = {part: kept.all() for part, kept in parts.items()}
    if out is not None:
        begin_copy(out, found)
    for part, kept in parts.items():
        for _ in (_inner if part == "inner" else _methods)(benchmark, data, kept, console, form):
            found[part] = kept.all()
            if out is not None:
                write_json(out, found)

    rows = [
        {"part": part} | row
        for part, entries in found.items()
        for entry in entries
        for row in entry["rows"]
    ]
    if form is not None:
        show_rows(rows, form, lambda rows: Table(), console)
    return rows


def _kept(part: str, benchmark: TrainingBenchmark, data: ImageData, folder: Path) -> Kept:
    of = {"data": data.name, "checksum": data.checksum}
    if part == "inner":
        place = folder / f"inner-{origin_digest()}"
        return Kept(place, of | benchmark.inner._asdict(), inner_are_whole)
    return Kept(folder / part, of | benchmark.study.as_dict(), are_whole)


def _inner(
    benchmark: TrainingBenchmark, data: ImageData, kept: Kept, console: Console, form: str | None
) -> Iterator[None]:
    """Measure the steps of each model in each dtype. Say at the start and after each how long the
    others will take."""
    places = {
        f"{m}-{dtype}": (m, dtype) for m, dtype in product(benchmark.models, benchmark.dtypes)
    }
    pace = Remaining(
        {
            name: expected_seconds(*place, data, benchmark.inner)
            for name, place in places.items()
            if kept.read(name) is None
        }
    )
    for line in kept.damage(pace.left):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if pace.left:
        console.print(
            f"Steps of {counted(len(pace.left), 'model')} to measure, in about "
            f"{in_words(pace.seconds_left)}.",
            highlight=False,
        )
    for name, (model, dtype) in places.items():
        measured = kept.read(name)
        if measured is None:
            about = f"about {in_words(pace.seconds_of(name))}"
            console.print(f"{MODELS[model]}, {dtype}, {about} …", highlight=False)
            start = time.monotonic()
            measured = kept.write(name, measure_inner(model, dtype, data, benchmark.inner))
            pace.note(name, time.monotonic() - start)
            if pace.left:
                console.print(
                    f"{len(pace.left)} left, about {in_words(pace.seconds_left)}", highlight=False
                )
        else:
            console.print(f"{kept.folder / name}.json was measured before:", highlight=False)
        if form is None:
            print_table(inner_table(measured["rows"]), console)
        yield
    rows = [row for entry in kept.all() for row in entry["rows"]]
    write_atomically(kept.folder / MARKDOWN, inner_markdown(rows))
    console.print(LEGEND, highlight=False)
    if not has_peer():
        console.print(f"Not installed here, so not measured: {PEER}.", highlight=False)


def _methods(
    benchmark: TrainingBenchmark, data: ImageData, kept: Kept, console: Console, form: str | None
) -> Iterator[None]:
    """Train and evaluate, seed by seed, so that pairs are whole early."""
    runs = [
        run
        for seed, model, method in product(benchmark.seeds, benchmark.models, benchmark.methods)
        if (run := Run(model, method, seed)).is_possible()
    ]
    if not runs:
        raise UserError(
            f"--methods {', '.join(benchmark.methods)} need a model with experts, got --models "
            f"{', '.join(benchmark.models)}"
        )
    missing = [run for run in runs if kept.read(run.name) is None]
    for line in kept.damage(run.name for run in missing):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if missing:
        least, most = expected_ends(missing, data, benchmark.study)
        console.print(
            f"{counted(len(missing), 'training')} to make and to evaluate: "
            f"{range_in_words(least, most)}, the more the longer images hold.",
            highlight=False,
            soft_wrap=True,
        )
    start, done = time.monotonic(), 0
    for number, run in enumerate(runs, 1):
        row = do(run, data, benchmark.study, kept, console)
        done += run in missing
        seconds = (time.monotonic() - start) / max(done, 1) * (len(missing) - done)
        left = f"; about {in_words(seconds)} left" if done and done < len(missing) else ""
        console.print(
            f"{number}/{len(runs)}  {run_line(row)}{left}", highlight=False, soft_wrap=True
        )
        yield

    rows = sorted((row for entry in kept.all() for row in entry["rows"]), key=_place)
    results = method_results(rows)
    write_atomically(kept.folder / MARKDOWN, methods_markdown(results, model_differences(rows)))
    if form is None:
        print_table(methods_table(results), console)
    if (origins := len(kept.origins())) > 1:
        console.print(
            f"[bold]These rows are from {origins} machines or versions[/]; each file in "
            f"{kept.folder} says which. Accuracies may be compared, times may not.",
            highlight=False,
        )


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    """Where a run stands in the table: models and methods in the order of their registers."""
    return list(MODELS).index(row["model"]), list(VARIANTS).index(row["method"]), row["seed"]
