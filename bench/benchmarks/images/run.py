"""Runs the parts of ``ironmoe bench images``, each in a process of its own, and keeps each row."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.images.attacking import attacked
from ironmoe.bench.benchmarks.images.expected import (
    attack_seconds,
    loading_seconds,
    pass_seconds,
)
from ironmoe.bench.benchmarks.images.jpegs import make_jpegs
from ironmoe.bench.benchmarks.images.loading import LOADERS, WARM, loaded
from ironmoe.bench.benchmarks.images.memory import Row, in_a_process
from ironmoe.bench.benchmarks.images.vit_s import MODELS, SOURCES, why_not
from ironmoe.bench.common.durations import in_words
from ironmoe.bench.common.files import write_json
from ironmoe.bench.common.machine.origin import origin_digest
from ironmoe.bench.common.rows.found import are_times, is_share
from ironmoe.bench.common.rows.kept import Kept, begin_copy
from ironmoe.bench.common.rows.remaining import Remaining
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.formats import show_rows
from ironmoe.bench.reports.tables import print_table

FEWER = 10  # the memory of a tenth of the images stands beside that of all


class ImageBenchmark(NamedTuple):
    """parts: "loading", "attack"; images, attack_images: of either; workers: processes that decode;
    runs: of each loader, in turns; batch_size, dtype: of the attack."""

    parts: tuple[str, ...]
    images: int
    attack_images: int
    workers: int
    runs: int
    batch_size: int
    dtype: str


PARTS = ("loading", "attack")


def run_bench_images(
    benchmark: ImageBenchmark,
    folder: Path,
    out: Path | None,
    console: Console,
    form: str | None = None,
) -> list[Row]:
    """Measure what ``folder`` has no rows of yet, of this machine and these versions. Print each
    row as it comes, and the tables or the rows; return the rows.

    Raises:
        UserError: the file or the folder cannot be used.
    """
    kept = Kept(folder / f"rows-{origin_digest()}", {"of": "images"}, _are_whole)
    if out is not None:
        begin_copy(out, {"measured": kept.all()})
    counts = {"loading": benchmark.images, "attack": benchmark.attack_images}
    most = max(counts[part] for part in benchmark.parts)
    files = [str(file) for file in make_jpegs(folder / "jpegs", most, console)]

    rows: list[Row] = []
    for part in benchmark.parts:
        plan = PLANS[part](benchmark, files, folder, console)
        found = list(_measured(plan, kept, out, console))
        if form is None:
            print_table(TABLES[part](found), console)
        rows += [{"part": part} | row for row in found]
    if form is not None:
        show_rows(rows, form, lambda rows: Table(), console)
    return rows


class Planned(NamedTuple):
    """A row to be measured. name: of its file; expected: the seconds that it will take, about;
    work: makes it."""

    name: str
    expected: Callable[[], float]
    work: tuple[Any, ...]


def _measured(
    plan: Sequence[Planned], kept: Kept, out: Path | None, console: Console
) -> Iterator[Row]:
    """The rows, from the folder or measured now. Say at the start and after each row how long the
    others will take."""
    pace = Remaining({one.name: one.expected() for one in plan if kept.read(one.name) is None})
    for line in kept.damage(pace.left):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if pace.left:
        console.print(
            f"{counted(len(pace.left), 'row')} to measure, in about {in_words(pace.seconds_left)}.",
            highlight=False,
        )
    for one in plan:
        known = kept.read(one.name)
        if known is None:
            start = time.monotonic()
            known = kept.write(one.name, [in_a_process(*one.work)])
            pace.note(one.name, time.monotonic() - start)
            if out is not None:
                write_json(out, {"measured": kept.all()})
        row: Row = known["rows"][0]
        left = f"; about {in_words(pace.seconds_left)} left" if pace.left else ""
        console.print(f"{one.name}: {_short(row)}{left}", highlight=False, soft_wrap=True)
        yield row


def _loading(
    benchmark: ImageBenchmark, files: list[str], folder: Path, console: Console
) -> list[Planned]:
    """Loaders take turns. The first of the runs is of a tenth of the images, for its memory, where
    that is enough to be timed."""
    few = benchmark.images // FEWER
    plan = [(benchmark.images, run) for run in range(benchmark.runs)]
    plan = [(few, 0), *plan] if few >= 2 * WARM else plan
    return [
        Planned(
            f"loading-{loader}-{images}-{benchmark.workers}-{run}",
            partial(loading_seconds, files, images, benchmark.workers),
            (loaded, loader, files[:images], benchmark.workers),
        )
        for images, run in plan
        for loader in LOADERS
    ]


def _attack(
    benchmark: ImageBenchmark, files: list[str], folder: Path, console: Console
) -> list[Planned]:
    plan = []
    count, workers, size = benchmark.attack_images, benchmark.workers, benchmark.batch_size
    for source in SOURCES:
        if reason := why_not(source):
            console.print(f"{source}: not measured, {reason}", highlight=False, markup=False)
            continue
        of_pass = cache(partial(pass_seconds, source, size, benchmark.dtype, folder))
        for model in MODELS:
            name = f"attack-{source}-{model}-{count}-{workers}-{size}-{benchmark.dtype}"
            work = (attacked, source, model, files[:count], workers, size, benchmark.dtype)
            expected = partial(_attack_seconds, of_pass, model, count)
            plan.append(Planned(name, expected, (*work, str(folder), name)))
    return plan


def _attack_seconds(of_pass: Callable[[], float], model: str, images: int) -> float:
    """The pass is timed once, and only if a row is missing."""
    return attack_seconds(of_pass(), model, images)


def _short(row: Row) -> str:
    waited = f", {row['waited_share']:.1%} waiting" if "waited_share" in row else ""
    return f"{row['images_per_second']:.1f} images/s, {row['peak_mb']:.0f} MB{waited}"


def _are_whole(rows: list[Row]) -> bool:
    """Whether there is one row, which has its figures, and possible ones."""
    return len(rows) == 1 and all(
        are_times([row.get("images_per_second"), row.get("peak_mb"), row.get("images")])
        and ("loader" in row or {"model_share", "waited_share", "robust_accuracy"} <= row.keys())
        and all(is_share(row[name]) for name in ("model_share", "waited_share") if name in row)
        for row in rows
    )


def _loading_table(rows: list[Row]) -> Table:
    table = Table("loader", "images", "images/s", "peak MB", "a worker's MB", title="Loading")
    for loader, images in dict.fromkeys((row["loader"], row["images"]) for row in rows):
        same = [row for row in rows if (row["loader"], row["images"]) == (loader, images)]
        middle = {
            key: statistics.median(row[key] for row in same)
            for key in ("images_per_second", "peak_mb", "worker_peak_mb")
        }
        table.add_row(
            loader,
            str(images),
            f"{middle['images_per_second']:.0f}",
            f"{middle['peak_mb']:.0f}",
            f"{middle['worker_peak_mb']:.0f}",
        )
    alike = len({row["checksum"] for row in rows}) == 1
    table.caption = "Pixels of both are " + ("the same." if alike else "NOT the same.")
    return table


def _attack_table(rows: list[Row]) -> Table:
    table = Table(
        "from", "ViT-S", "images", "images/s", "in the model", "waiting", "peak MB", "robust %",
        title="PGD-10 at 4/255",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["source"],
            row["model"],
            str(row["images"]),
            f"{row['images_per_second']:.2f}",
            f"{row['model_share']:.1%}",
            f"{row['waited_share']:.2%}",
            f"{row['peak_mb']:.0f}",
            f"{row['robust_accuracy']:.1f}",
        )
    return table


PLANS = {"loading": _loading, "attack": _attack}
TABLES = {"loading": _loading_table, "attack": _attack_table}
