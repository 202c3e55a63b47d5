"""Runs the parts of ``ironmoe bench images``, each in a process of its own, and keeps each row."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ironmoe.bench.benchmarks.images.attacking import attacked
from ironmoe.bench.benchmarks.images.jpegs import make_jpegs
from ironmoe.bench.benchmarks.images.loading import LOADERS, WARM, loaded
from ironmoe.bench.benchmarks.images.memory import Row, in_a_process
from ironmoe.bench.benchmarks.images.vit_s import MODELS, SOURCES, why_not
from ironmoe.bench.benchmarks.training.kept import Kept
from ironmoe.bench.common.files import write_json

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
    benchmark: ImageBenchmark, folder: Path, out: Path | None, console: Console
) -> None:
    """Measure what is not kept in ``folder`` yet, print each row as it comes, and the tables."""
    kept = Kept(folder / "rows", {"of": "images"})
    counts = {"loading": benchmark.images, "attack": benchmark.attack_images}
    most = max(counts[part] for part in benchmark.parts)
    files = [str(file) for file in make_jpegs(folder / "jpegs", most, console)]

    rows: dict[str, list[Row]] = {}
    if "loading" in benchmark.parts:
        rows["loading"] = _loading(benchmark, files, kept, console)
        console.print(_loading_table(rows["loading"]))
    if "attack" in benchmark.parts:
        rows["attack"] = _attack(benchmark, files, folder, kept, console)
        console.print(_attack_table(rows["attack"]))
    if out is not None:
        write_json(out, {"measured": kept.all()})


def _loading(
    benchmark: ImageBenchmark, files: list[str], kept: Kept, console: Console
) -> list[Row]:
    """Loaders take turns. The first of the runs is of a tenth of the images, for its memory, where
    that is enough to be timed."""
    few = benchmark.images // FEWER
    plan = [(benchmark.images, run) for run in range(benchmark.runs)]
    plan = [(few, 0), *plan] if few >= 2 * WARM else plan
    found = []
    for images, run in plan:
        for loader in LOADERS:
            name = f"loading-{loader}-{images}-{benchmark.workers}-{run}"
            work = (loaded, loader, files[:images], benchmark.workers)
            found.append(_row(name, kept, console, *work))
    return found


def _attack(
    benchmark: ImageBenchmark, files: list[str], folder: Path, kept: Kept, console: Console
) -> list[Row]:
    found = []
    count = benchmark.attack_images
    for source in SOURCES:
        if reason := why_not(source):
            console.print(f"{source}: not measured, {reason}", highlight=False, markup=False)
            continue
        for model in MODELS:
            size = benchmark.batch_size
            name = f"attack-{source}-{model}-{count}-{benchmark.workers}-{size}-{benchmark.dtype}"
            work = (attacked, source, model, files[:count], benchmark.workers, size)
            found.append(_row(name, kept, console, *work, benchmark.dtype, str(folder), name))
    return found


def _row(name: str, kept: Kept, console: Console, *work: Any) -> Row:
    """The row of this name, from the folder or measured now."""
    known = kept.read(name)
    if known is None:
        known = kept.write(name, [in_a_process(*work)])
    row: Row = known["rows"][0]
    console.print(f"{name}: {_short(row)}", highlight=False)
    return row


def _short(row: Row) -> str:
    waited = f", {row['waited_share']:.1%} waiting" if "waited_share" in row else ""
    return f"{row['images_per_second']:.1f} images/s, {row['peak_mb']:.0f} MB{waited}"


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
