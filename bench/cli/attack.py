"""``ironmoe attack``: reads its options and calls ``attack/run.py``."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ironmoe.bench.cli.image_options import (
    ClassMap,
    Crop,
    Interpolation,
    Labels,
    Mean,
    Resize,
    Std,
    Workers,
    announce_set,
)
from ironmoe.bench.cli.options import (
    Alpha,
    AttackImages,
    AttackSeed,
    BatchSize,
    Data,
    Device,
    Eps,
    ImageSize,
    Norm,
    Out,
    SkipBad,
    announce_radii,
    bounded,
    chosen_device,
)
from ironmoe.bench.common.choices import SHORT_DTYPES, named
from ironmoe.bench.common.errors import clear_errors
from ironmoe.bench.common.radii import ascending_radii, step_length


def attack(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .safetensors checkpoint that **ironmoe demo** or **ironmoe train** wrote.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a checkpoint: {model_forms}. What may follow a name after the "
            "question mark is in docs/models.md. A function returns a torch module from images in "
            "[0, 1] to logits."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="With --model: a .safetensors file whose tensors replace those of the model, such "
            "as **ironmoe train** writes it."
        ),
    ] = None,
    data: Data = "mnist",
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Attack all images, not only the test split. For data the model was not trained "
            "on.",
        ),
    ] = False,
    attacks: Annotated[
        str,
        typer.Option(
            "--attack",
            help="Names, separated by commas: {attacks}.",
        ),
    ] = "pgd",
    seed: AttackSeed = 0,
    eps: Eps = None,
    norm: Norm = "Linf",
    steps: Annotated[
        int | None,
        bounded(
            "Steps from each start, for {attacks_with_steps}. By default each one's own; "
            "{usual_steps}.",
            1,
        ),
    ] = None,
    queries: Annotated[
        int | None, bounded("Queries of Square, by default its own {usual_queries}.", 1)
    ] = None,
    restarts: Annotated[
        int | None,
        bounded(
            "Runs from different random starts, for {attacks_with_restarts}. By default each "
            "one's own; {usual_restarts}.",
            1,
        ),
    ] = None,
    alpha: Alpha = None,
    eot: Annotated[
        int | None,
        bounded(
            "For random models: each answer, logits and gradient, is the mean of this many, for "
            "every attack. By default 1; {usual_eot}.",
            1,
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="What the search does to routing: {routing}. Verdicts leave it free.",
        ),
    ] = "free",
    levels: Annotated[
        int | None,
        bounded(
            "How many values a pixel of an adversarial image may have, from 0 to 1 in equal steps: "
            "**256** for 8-bit images. By default any; 256 with --save-images png.",
            2,
        ),
    ] = None,
    save_images: Annotated[
        str | None,
        typer.Option(
            help="Write the adversarial images that were found into the folder adversarial: as "
            "**png** files, which read back are the same successes, or as **npz**, one for each "
            "attack. index.csv there lists them."
        ),
    ] = None,
    attack_images: AttackImages = 500,
    batch_size: BatchSize = 500,
    max_seconds: Annotated[
        float | None,
        bounded(
            "End the attacks after this time. The same command goes on from there.", 0, above=True
        ),
    ] = None,
    max_forwards: Annotated[
        int | None,
        bounded(
            "End the attacks before more forward passes of single images are made, in this run.", 1
        ),
    ] = None,
    checks: Annotated[
        bool,
        typer.Option(
            help="Look for signs of false security: masked gradients, randomness and their like."
        ),
    ] = True,
    passes: Annotated[
        int | None,
        bounded(
            "How many passes of the model each verdict rests on. By default 1; 64 where the checks "
            "find the model random, or with --eot above 1.",
            1,
        ),
    ] = None,
    on_bad: Annotated[
        str,
        typer.Option(
            help="Images for which the model gives nothing finite: **raise** an error that names "
            "them, or **skip** them, which counts them as neither robust nor fallen."
        ),
    ] = "raise",
    device: Device = "auto",
    expert_parallel: Annotated[
        int,
        bounded(
            "Under torchrun: so many processes hold the experts of a model together and work on "
            "the same images, for models that are too large for one GPU. It divides the number of "
            "processes.",
            1,
        ),
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="{search_dtypes} for the search under autocast; verdicts are float32 in any case."
        ),
    ] = "float32",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload-experts",
            help="Keep experts in host memory and bring those that a pass uses to the GPU, one "
            "layer after another: for models that are larger than it.",
        ),
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute the pre-activations of experts again in the backward pass: less memory, "
            "more time.",
        ),
    ] = False,
    out: Out = None,
    image_size: ImageSize = None,
    skip_bad: SkipBad = False,
    labels: Labels = None,
    class_map: ClassMap = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    workers: Workers = None,
) -> None:
    r"""Attack a model from anywhere, with attacks, settings and data of your own, and write a
    report.

    Writes report.html, report.json, images.csv (and .jsonl) with a row for each image and attack,
    and table.tex (and .csv) for a paper. **ironmoe compare** tests two runs against each other.

    Interrupted or at the end of its budget, the same command goes on from there.

    Examples:

        ironmoe attack \
            runs/mnist-1a2b3c4d/checkpoints/v-moe-seed0.safetensors \
            --attack autoattack --eps 4,8

        ironmoe attack --model hf:my-vit --data photos --all \
            --attack pgd,square --norm L2 --eps 64,128,255

    On several GPUs or processes:

        torchrun --nproc-per-node 8 -m ironmoe.bench attack \
            --model hf:my-vit --data photos --attack autoattack

        torchrun --nproc-per-node 8 -m ironmoe.bench attack \
            --model hf:my-moe --data photos --expert-parallel 4
    """
    from ironmoe.bench.common.processes import is_first_process

    console = Console(quiet=not is_first_process())
    with clear_errors(console):
        from ironmoe.attacks.balls.ball import norm_named
        from ironmoe.attacks.registry import named_attacks
        from ironmoe.bench.attack.attacked_images import ImageOptions
        from ironmoe.bench.attack.options import AttackOptions
        from ironmoe.bench.attack.run import run_attack_command
        from ironmoe.bench.attack.saved.found_images import FORMS
        from ironmoe.bench.attack.saved.png import LEVELS as PNG_LEVELS
        from ironmoe.bench.attack.suite import DTYPES, ROUTING, Suite
        from ironmoe.bench.data.sets import open_data
        from ironmoe.bench.models.overrides import Overrides

        names = tuple(dict.fromkeys(named(name, named_attacks()) for name in attacks.split(",")))
        norm = norm_named(norm)
        saved_as = None if save_images is None else named(save_images, FORMS)
        suite = Suite(
            names=names,
            norm=norm,
            eps_255=ascending_radii(eps, norm),
            steps=steps,
            queries=queries,
            restarts=restarts,
            alpha_255=step_length(alpha),
            eot=eot,
            seed=seed,
            dtype=named(SHORT_DTYPES.get(dtype.lower(), dtype), DTYPES),
            routing=named(routing, ROUTING),
            levels=PNG_LEVELS if levels is None and saved_as == "png" else levels,
        )
        suite.check()
        bad = _on_bad(on_bad)
        target = chosen_device(device)
        overrides = Overrides.parse(
            resize=resize, crop=crop, interpolation=interpolation, mean=mean, std=std
        )
        images = open_data(data, labels)
        announce_set(images, console)
        for line in suite.notes:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        announce_radii(suite.eps_255, suite.norm, console, suite.alpha_255)
        options = AttackOptions(
            checkpoint=checkpoint,
            model_spec=model,
            data=ImageOptions(
                images=images,
                everything=everything,
                most=attack_images,
                image_size=image_size,
                skip_bad=skip_bad,
                workers=workers,
                class_map=class_map,
            ),
            suite=suite,
            overrides=overrides,
            batch_size=batch_size,
            device=target,
            out=out,
            checks=checks,
            max_seconds=max_seconds,
            max_forwards=max_forwards,
            save_images=saved_as,
            passes=passes,
            on_bad=bad,
            weights=weights,
            offload_experts=offload,
            recompute=recompute,
            expert_parallel=expert_parallel,
        )
        run_attack_command(options, console)


def _on_bad(choice: str) -> Literal["raise", "skip"]:
    found = named(choice, ("raise", "skip"))
    if found == "raise":
        return "raise"
    if found == "skip":
        return "skip"
    raise typer.BadParameter(f"--on-bad must be raise or skip, got {choice!r}")
