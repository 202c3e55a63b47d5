"""``ironmoe bench attacks``: its options."""

from pathlib import Path
from typing import Annotated

import typer

from ironmoe.bench.cli.benchmarks.rows_options import Again, Format, RowsOut, notes_console
from ironmoe.bench.cli.options import bounded
from ironmoe.bench.common.choices import chosen_names
from ironmoe.bench.common.errors import clear_errors


def bench_attacks(
    parts: Annotated[
        str,
        typer.Option(
            help="Separated by commas: **pgd**, **autoattack**, **bf16** (the search in bfloat16 "
            "beside float32), "
            "**reference** (AutoAttack in Linf and L2 on three models)."
        ),
    ] = "pgd,autoattack,bf16",
    images: Annotated[int, bounded("Images that PGD attacks.", 1)] = 200,
    autoattack_images: Annotated[int, bounded("Images that AutoAttack attacks.", 1)] = 50,
    runs: Annotated[
        int, bounded("Runs of PGD by each library, in turns; the median is printed.", 1)
    ] = 3,
    batch_size: Annotated[int, bounded("Images in a batch, for every library.", 1)] = 200,
    epochs: Annotated[
        int, bounded("Passes over the training images. Models are kept for the next command.", 1)
    ] = 12,
    data: Annotated[
        str, typer.Option(help="**mnist**, **digits**, a folder of images, or an .npz file.")
    ] = "mnist",
    folder: Annotated[Path, typer.Option(help="Where the trained models are kept.")] = Path(
        "runs/bench-attacks"
    ),
    out: RowsOut = None,
    again: Again = False,
    form: Format = None,
) -> None:
    """Run PGD and AutoAttack by ironmoe and by torchattacks, foolbox, adv-lib and the official
    AutoAttack, as far as they are installed.

    They attack a V-MoE, which falls, and one that was trained to be robust. Robust accuracies are
    compared before times, and a ratio is printed only if they agree. The official AutoAttack is
    found if its folder is on PYTHONPATH. Each run of a library is printed and written when it is
    over; after Ctrl-C or a kill the same command goes on.

    Example:

        ironmoe bench attacks --parts pgd --images 500
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.attacks.contests import PARTS, AttackBenchmarkSettings
        from ironmoe.bench.benchmarks.attacks.run import run_bench_attacks
        from ironmoe.bench.data.in_memory import load_data
        from ironmoe.bench.reports.formats import checked_format

        checked = checked_format(form)
        chosen = chosen_names("--parts", parts, PARTS)
        settings = AttackBenchmarkSettings(
            images=images,
            autoattack_images=autoattack_images,
            runs=runs,
            batch_size=batch_size,
            epochs=epochs,
        )
        run_bench_attacks(
            load_data(data, None, False),
            settings,
            chosen,
            folder,
            console,
            out=out,
            again=again,
            form=checked,
        )
