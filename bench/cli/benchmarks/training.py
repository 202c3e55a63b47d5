"""``ironmoe bench training``: its options."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ironmoe.bench.cli.benchmarks.rows_options import Format, notes_console
from ironmoe.bench.cli.options import bounded
from ironmoe.bench.common.choices import SHORT_DTYPES, chosen_names
from ironmoe.bench.common.errors import clear_errors


def bench_training(
    parts: Annotated[
        str,
        typer.Option(
            help="Separated by commas: **inner** (what one training step costs, beside the common "
            "loop), **methods** (what each method achieves, over several seeds)."
        ),
    ] = "inner,methods",
    models: Annotated[
        str, typer.Option(help="Separated by commas: {training_models}.")
    ] = "v-moe,vit",
    dtypes: Annotated[
        str, typer.Option(help="Of the part inner, separated by commas: **float32**, **bfloat16**.")
    ] = "float32,bfloat16",
    runs: Annotated[
        int, bounded("Of the part inner: steps of each kind, in turns; the median counts.", 1)
    ] = 15,
    seconds: Annotated[
        float, bounded("Of the part inner: no new round begins after these, for each model.", 0)
    ] = 600.0,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of the part methods, separated by commas: {training_variants}. By default all."
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            help="Of the part methods, separated by commas. Processes that share a --folder take "
            "different ones."
        ),
    ] = "0,1,2,3",
    epochs: Annotated[int, bounded("Passes over the training images.", 1)] = 12,
    images: Annotated[int, bounded("Test images that PGD-20 attacks, at most.", 1)] = 500,
    apgd_images: Annotated[int, bounded("Test images that APGD-T attacks, at most.", 1)] = 200,
    apgd_steps: Annotated[int, bounded("Steps of APGD-T at each target.", 1)] = 100,
    eps: Annotated[
        float,
        bounded("Radius of training and attacks, in units of 1/255 of the pixel range.", 0.01),
    ] = 25.5,
    data: Annotated[
        str, typer.Option(help="**mnist**, **digits**, a folder of images, or an .npz file.")
    ] = "mnist",
    folder: Annotated[
        Path, typer.Option(help="Where every result is kept, and the trained weights.")
    ] = Path("runs/bench-training"),
    out: Annotated[
        Path | None, typer.Option(help="Also write the rows as JSON to this file, after each.")
    ] = None,
    form: Format = None,
) -> None:
    r"""Measure adversarial training: what a step costs beside the loop that most repositories have,
    and how robust each method makes a V-MoE and a dense ViT, over paired seeds.

    Adversarial images are compared before times. What is finished is kept in --folder, and the same
    command goes on from there.

    Example:

        ironmoe bench training --parts methods \
            --methods pgd-at,trades --seeds 0,1
    """
    console = notes_console(form)
    with clear_errors(console):
        from ironmoe.bench.benchmarks.training.evaluation import EvaluationSettings
        from ironmoe.bench.benchmarks.training.inner import DTYPES, InnerSettings
        from ironmoe.bench.benchmarks.training.models import MODELS
        from ironmoe.bench.benchmarks.training.run import (
            PARTS,
            TrainingBenchmark,
            run_bench_training,
        )
        from ironmoe.bench.benchmarks.training.runs import VARIANTS, StudySettings
        from ironmoe.bench.common.radii import from_255
        from ironmoe.bench.data.in_memory import load_data
        from ironmoe.bench.reports.formats import checked_format

        checked = checked_format(form)
        radius = from_255(eps)
        evaluation = EvaluationSettings(radius, images, apgd_images, apgd_steps)
        benchmark = TrainingBenchmark(
            parts=chosen_names("--parts", parts, PARTS),
            models=chosen_names("--models", models, MODELS),
            dtypes=_dtypes(dtypes, DTYPES),
            methods=(
                tuple(VARIANTS) if methods is None else chosen_names("--methods", methods, VARIANTS)
            ),
            seeds=_seeds(seeds),
            inner=InnerSettings(eps=radius, runs=runs, seconds=seconds),
            study=StudySettings(epochs, evaluation),
        )
        images_and_labels = load_data(data, None, False)
        run_bench_training(benchmark, images_and_labels, folder, out, console, checked)


def _dtypes(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """UserError: one of them is not known. "bf16" is "bfloat16"."""
    names = (name.strip() for name in text.split(","))
    return chosen_names(
        "--dtypes", ",".join(SHORT_DTYPES.get(name.lower(), name) for name in names), known
    )


def _seeds(text: str) -> tuple[int, ...]:
    """typer.BadParameter: one of them is no integer of at least 0."""
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise typer.BadParameter(
                f"--seeds must be integers of at least 0, got {part.strip()!r}"
            )
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))
