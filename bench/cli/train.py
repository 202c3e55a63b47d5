"""``ironmoe train``: reads its options and calls ``train/run.py``."""

from typing import Annotated, Any

import typer
from rich.console import Console

from ironmoe.bench.cli.options import (
    LARGEST_SEED,
    AttackImages,
    Data,
    Device,
    ImageSize,
    Out,
    SkipBad,
    announce,
    announce_radii,
    bounded,
    chosen_device,
)
from ironmoe.bench.common.choices import SHORT_DTYPES, named
from ironmoe.bench.common.errors import clear_errors
from ironmoe.bench.common.radii import one_radius, step_length, usual_radius


def train(
    data: Data = "mnist",
    model: Annotated[
        str,
        typer.Option(
            help="**v-moe** or **vit** (the demo's two, for small images), a paper's name such as "
            "**V-MoE-S/16**, a **.safetensors** file of this library, or any that **ironmoe attack "
            "--model** takes, such as **timm:NAME**, **hf:FOLDER** or **package.module:function**."
        ),
    ] = "v-moe",
    method: Annotated[str, typer.Option(help="{training_methods}.")] = "pgd-at",
    eps: Annotated[
        str | None,
        typer.Option(
            help="Radius of the adversarial images, in units of 1/255 of the pixel range, whatever "
            "the norm: 128 is an L2 norm of 0.5. It grows linearly over the first half of the "
            "training. By default {usual_training_radii}."
        ),
    ] = None,
    norm: Annotated[str, typer.Option(help="{norms}.")] = "Linf",
    steps: Annotated[
        int | None,
        bounded("Steps of the inner attack, for methods of several steps. By default 4.", 1),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Step length of the inner attack, in the unit of --eps. By default the method's "
            "own; with several steps 2.5 · eps / steps, at least eps / 10."
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="**eval** or **train**: how the inner attack runs the model. In training mode it "
            "meets dropout, router noise and batch statistics."
        ),
    ] = "eval",
    routing: Annotated[
        str, typer.Option(help="What the inner attack does to routing: {routing}.")
    ] = "free",
    beta: Annotated[
        float | None,
        bounded("Weight of the method's second loss, for {takers_of_beta}.", 0),
    ] = None,
    noise: Annotated[
        float | None,
        bounded("Radius of the noise before the step, in units of eps, for {takers_of_noise}.", 0),
    ] = None,
    replays: Annotated[
        int | None,
        bounded(
            "Steps of the optimizer that each batch gives, for {takers_of_replays}: divide the "
            "epochs by it.",
            1,
        ),
    ] = None,
    weight: Annotated[
        float | None,
        bounded("Weight of the penalty on routing, for {takers_of_weight}.", 0),
    ] = None,
    routing_weight: Annotated[
        float | None,
        bounded(
            "How much the attack raises the change of routing, for {takers_of_routing_weight}.", 0
        ),
    ] = None,
    routing_beta: Annotated[
        float | None,
        bounded("Weight of the routers' own penalty, for {takers_of_routing_beta}.", 0),
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Of the cross-entropy, from 0 to below 1.")
    ] = 0.0,
    awp: Annotated[
        float | None,
        typer.Option(
            help="Adversarial weight perturbation: gamma, how far weights are moved as a share of "
            "their norm, such as 0.005, once eps has grown. By default weights stay."
        ),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Choose and save the exponential moving average of the weights: its decay, such "
            "as 0.995."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        bounded(
            "Passes over the training images. By default 12; on fewer than 4,000 images more, up "
            "to 100.",
            1,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        bounded("Images of a step of the optimizer. By default 100, or all if there are fewer.", 1),
    ] = None,
    parts: Annotated[
        int | None,
        bounded(
            "Split each batch into so many parts, whose gradients add up: for memory. By default "
            "as many as there are processes.",
            1,
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest rate of AdamW.")] = 2e-3,
    weight_decay: Annotated[float, bounded("Of AdamW.", 0)] = 0.05,
    schedule: Annotated[
        str,
        typer.Option(
            help="**one-cycle** (its peak after 20 % of the steps) or **cosine** (after a warm-up "
            "of 10 %)."
        ),
    ] = "one-cycle",
    shifts: Annotated[
        bool,
        typer.Option(
            help="Move each training image by up to 2 pixels at random. Small models that begin "
            "anew learn more slowly with it."
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="**float32**, or **bfloat16**: the model runs under autocast; perturbations and "
            "losses stay float32."
        ),
    ] = "float32",
    checkpointing: Annotated[
        bool,
        typer.Option(
            help="Keep only the input of each block and run the block again in the backward pass: "
            "less memory, more time."
        ),
    ] = False,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Run the model through torch.compile.")
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            help="Under torchrun: each process holds a part of the weights (FSDP2). A process "
            "alone holds all."
        ),
    ] = False,
    expert_parallel: Annotated[
        int,
        bounded(
            "Under torchrun: share the experts of each layer out over so many processes, which "
            "send each other tokens. It divides the number of processes and that of experts.",
            1,
        ),
    ] = 1,
    guard: Annotated[
        bool,
        typer.Option(
            help="Stop a training against one step that loses its robustness to several steps."
        ),
    ] = True,
    attack: Annotated[
        bool,
        typer.Option(help="Attack the chosen weights on test images by APGD-T at the end."),
    ] = True,
    attack_images: AttackImages = 500,
    seed: Annotated[
        int,
        bounded(
            "Weights, batches, router noise and random starts depend on it.", 0, most=LARGEST_SEED
        ),
    ] = 0,
    device: Device = "auto",
    out: Out = None,
    image_size: ImageSize = None,
    skip_bad: SkipBad = False,
) -> None:
    r"""Train a model on adversarial images, choose its weights by held-out training images, attack
    them on test images, and report.

    Writes model.safetensors, which **ironmoe attack** takes, report.html, report.json, the pictures
    and the report of the attack.

    After Ctrl-C or a kill, the same command goes on from the last finished epoch, with the same
    numbers.

    Examples:

        ironmoe train --data mnist --eps 25.5 --method trades --beta 1

        ironmoe train --model hf:my-vit --data photos --eps 4 \
            --dtype bfloat16

    On several GPUs or processes:

        torchrun --nproc-per-node 8 -m ironmoe.bench train \
            --model hf:my-vit --data photos --eps 4

        torchrun --nproc-per-node 8 -m ironmoe.bench train \
            --model V-MoE-S/16 --data photos --fsdp --expert-parallel 4
    """
    from ironmoe.bench.common.processes import is_first_process

    console = Console(quiet=not is_first_process())
    own = {
        "beta": beta,
        "noise": noise,
        "replays": replays,
        "weight": weight,
        "routing_weight": routing_weight,
        "routing_beta": routing_beta,
    }
    with clear_errors(console):
        from ironmoe.attacks.balls.ball import norm_named
        from ironmoe.attacks.training import TRAINING_METHODS
        from ironmoe.bench.attack.suite import ROUTING
        from ironmoe.bench.common.train import default_epochs
        from ironmoe.bench.data.in_memory import load_data
        from ironmoe.bench.models.expert_parallel import check_processes
        from ironmoe.bench.train.options import TrainOptions, check_choice
        from ironmoe.bench.train.recipe import DTYPES, SCHEDULES, MethodChoice, TrainRecipe
        from ironmoe.bench.train.rows import split
        from ironmoe.bench.train.run import run_train_command
        from ironmoe.bench.train.trainee import pipeline_of

        norm = norm_named(norm)
        choice = MethodChoice(
            name=named(method, TRAINING_METHODS),
            eps_255=usual_radius(norm) if eps is None else one_radius(eps, norm),
            norm=norm,
            steps=steps,
            alpha_255=step_length(alpha),
            mode=named(mode, ("eval", "train")),
            routing=named(routing, ROUTING),
            label_smoothing=label_smoothing,
            awp=awp,
            own=_given(own),
        )
        check_choice(choice)
        check_processes(expert_parallel)
        target = chosen_device(device)
        pipeline = pipeline_of(model)
        images = load_data(data, image_size, skip_bad, pipeline=pipeline)
        announce(images, console)
        announce_radii([choice.eps_255], choice.norm, console, choice.alpha_255)
        trained_on = len(split(images).trained)
        recipe = TrainRecipe(
            epochs=epochs or default_epochs(trained_on),
            batch_size=batch_size or min(100, trained_on),
            parts=parts or _world(),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=named(schedule, SCHEDULES),
            ema=ema,
            shifts=shifts,
            dtype=named(SHORT_DTYPES.get(dtype.lower(), dtype), DTYPES),
            checkpointing=checkpointing,
            compile=compile_model,
        )
        options = TrainOptions(
            data=images,
            model=model,
            method=choice,
            recipe=recipe,
            seed=seed,
            device=target,
            out=out,
            fsdp=fsdp,
            expert_parallel=expert_parallel,
            guard=guard,
            attack=attack,
            attack_images=attack_images,
        )
        run_train_command(options, console)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _world() -> int:
    """How many processes there are."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))
