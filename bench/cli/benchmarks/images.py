"""``ironmoe bench images``: reads its options and calls ``benchmarks/images/run.py``."""

from pathlib import Path
from typing import Annotated

import typer

from ironmoe.bench.cli.benchmarks.rows_options import Format, notes_console
from ironmoe.bench.cli.options import bounded
from ironmoe.bench.common.choices import SHORT_DTYPES, chosen_names, named
from ironmoe.bench.common.errors import clear_errors

DTYPES = ("float32", "bfloat16")


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
    r"""Make JPEG files, and measure how fast they stream to an attack, with what memory, and
    whether the attack waits for them.

    Each row is measured in a process of its own and kept in --folder; the same command goes on from
    there.

    Example:

        ironmoe bench images --images 2000 --attack-images 64 \
            --batch-size 32
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.reports.formats import checked_format

        checked = checked_format(form)
        from ironmoe.bench.benchmarks.images.run import PARTS, ImageBenchmark, run_bench_images

        chosen = chosen_names("--parts", parts, PARTS)
        dtype = named(SHORT_DTYPES.get(dtype.lower(), dtype), DTYPES)
        if dtype not in DTYPES:
            raise typer.BadParameter(f"--dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
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
