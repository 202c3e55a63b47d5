"""``ironmoe bench images``: reads its options and calls ``benchmarks/images/run.py``."""

from pathlib import Path
from typing import Annotated

import typer

from ironmoe.bench.cli.options import bounded
from ironmoe.bench.cli.rows_options import Format, notes_console
from ironmoe.bench.common.errors import clear_errors


def bench_images(
    parts: Annotated[
        str,
        typer.Option(
            help="Separated by commas: **loading** (images off the disk, beside a plain loader), "
            "**attack** (PGD on two ViTs of ViT-S size)."
        ),
    ] = "loading,attack",
    images: Annotated[int, bounded("Images that the loaders read.", 1)] = 20_000,
    attack_images: Annotated[int, bounded("Images that are attacked.", 1)] = 2000,
    workers: Annotated[int, bounded("Processes that decode, for both loaders.", 1)] = 2,
    runs: Annotated[int, bounded("Runs of each loader, in turns; the median is printed.", 1)] = 3,
    batch_size: Annotated[int, bounded("Images attacked at once.", 1)] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the search: **float32** or **bfloat16**.")
    ] = "float32",
    folder: Annotated[
        Path, typer.Option(help="Where images, models and rows are kept: 2 GB for 20,000 images.")
    ] = Path("runs/bench-images"),
    out: Annotated[
        Path | None, typer.Option(help="Also write the rows as JSON to this file, after each.")
    ] = None,
    form: Format = None,
) -> None:
    """Make JPEG files, and measure how fast they stream to an attack, with what memory, and whether
    the attack waits for them.

    Each row is measured in a process of its own and kept in --folder; the same command goes on from
    there.

    Example: ironmoe bench images --images 2000 --attack-images 64 --batch-size 32
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.reports.formats import checked_format

        checked = checked_format(form)
        from ironmoe.bench.benchmarks.images.run import PARTS, ImageBenchmark, run_bench_images

        chosen = tuple(dict.fromkeys(part.strip() for part in parts.split(",")))
        for part in chosen:
            if part not in PARTS:
                raise typer.BadParameter(f"--parts must be among {', '.join(PARTS)}, got {part!r}")
        if dtype not in ("float32", "bfloat16"):
            raise typer.BadParameter(f"--dtype must be float32 or bfloat16, got {dtype!r}")
        benchmark = ImageBenchmark(
            parts=chosen,
            images=images,
            attack_images=attack_images,
            workers=workers,
            runs=runs,
            batch_size=batch_size,
            dtype=dtype,
        )
        run_bench_images(benchmark, folder, out, console, checked)
