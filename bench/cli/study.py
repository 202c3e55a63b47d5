"""``ironmoe study``: reads its options and calls ``study/run.py``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ironmoe.bench.cli.options import (
    LARGEST_SEED,
    Data,
    ImageSize,
    Out,
    SkipBad,
    announce,
    announce_radii,
    bounded,
    refuse,
)
from ironmoe.bench.common.choices import chosen_names
from ironmoe.bench.common.errors import clear_errors
from ironmoe.bench.common.radii import one_radius

WITH_FROM = ("from_", "out")
"""The options that go together with ``--from``."""
OF_LADDER = ("seeds", "first_seed", "arms", "trainings", "train_eps", "epochs")
"""The options that say nothing to models of one's own."""


def study(
    ctx: typer.Context,
    data: Data = "mnist",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Where you say nothing else: three arms, three seeds, ordinary training, fewer "
            "images and a part of the measurements. A first look in minutes.",
        ),
    ] = False,
    seeds: Annotated[
        int | None,
        bounded(
            "Trainings of each arm, by default 8. Six are the fewest whose signs alone can decide.",
            1,
        ),
    ] = None,
    first_seed: Annotated[
        int,
        bounded(
            "The first of the seeds: another machine can train others, and **--from** puts the "
            "numbers of both together.",
            0,
            most=LARGEST_SEED,
        ),
    ] = 0,
    arms: Annotated[
        str | None, typer.Option(help="Separated by commas: {study_arms}. By default all.")
    ] = None,
    trainings: Annotated[
        str | None, typer.Option(help="Separated by commas: {study_trainings}. By default both.")
    ] = None,
    measurements: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas: {study_measurements}. By default all but {study_optional}."
        ),
    ] = None,
    certificates: Annotated[
        bool,
        typer.Option(
            "--certificates",
            help="Also certify the smoothed models on 100 images: 100 noisy copies of each choose "
            "the class, 1,000 others are counted. Noise has a standard deviation of 0.25 of the "
            "pixel range.",
        ),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model of your own in place of the ladder, several times: **NAME@SEED=MODEL**, "
            "or **NAME=MODEL** for seed 0, where MODEL is a **.safetensors** file of this library, "
            "or any that **ironmoe attack --model** takes, such as **hf:FOLDER** or "
            "**package.module:function**. Models of one name are "
            "runs of one architecture; models of one seed are paired. **NAME@SEED/TRAINING=MODEL** "
            "tells "
            "trainings apart, which get verdicts of their own."
        ),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            help="Radii at which ordinary models and models of your own are attacked, separated by "
            "commas, in units of 1/255 of the pixel range; the third one, or the last of fewer, is "
            "that of attacks at one radius. By default 2,4,8,16."
        ),
    ] = None,
    train_eps: Annotated[
        str,
        typer.Option(
            help="Radius of adversarial training, in units of 1/255 of the pixel range. Models "
            "that are trained so are attacked at 0.5, 1, 1.5 and 2 times of it."
        ),
    ] = "25.5",
    epochs: Annotated[int, bounded("Passes over the training images.", 1)] = 12,
    images: Annotated[
        int | None,
        bounded(
            "Test images of the PGD curve, by default 400, with **--quick** 200, and the most that "
            "any measurement takes; the slower ones take 25 to 150, which the report counts.",
            1,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        bounded("Models that are worked on at once. By default one for each core.", 1),
    ] = None,
    expert_parallel: Annotated[
        int,
        bounded(
            "Under **torchrun**: processes that work on one model together, each with a part of "
            "its experts while it is measured. It must divide the number of processes; each group "
            "of so many is one worker. The numbers are those of one process, to rounding.",
            1,
        ),
    ] = 1,
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="A **report.json** of a study, several times: put their numbers together, judge "
            "them and write their report. Nothing is trained or measured.",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say how long it will take; train and measure nothing.")
    ] = False,
    out: Out = None,
    image_size: ImageSize = None,
    skip_bad: SkipBad = False,
) -> None:
    """Ask the questions of the paper of a ladder of models: are MoEs more robust than dense models
    of equal compute, does it help to have more experts, are they smoother, does it harm if the best
    experts differ, does the choice of experts matter?

    Every claim gets a verdict, supported, against or undecided, from paired trainings. Writes
    report.html, report.json and the trained models. What is finished is kept, and the same command
    goes on from there.

    Examples:

        ironmoe study --quick

        ironmoe study --data digits --seeds 8 --arms dense,E8 --plan

        torchrun --nproc-per-node 8 -m ironmoe.bench study --expert-parallel 2
    """
    from ironmoe.bench.common.processes import is_first_process, number_started

    console = Console(quiet=not is_first_process())
    with clear_errors(console):
        from ironmoe.bench.data.in_memory import load_data
        from ironmoe.bench.study.ladder.arms import LADDER
        from ironmoe.bench.study.ladder.training import TRAININGS, TrainingSettings
        from ironmoe.bench.study.measure.budget import (
            Budget,
            at_most,
            quick_budget,
            with_radii,
        )
        from ironmoe.bench.study.measure.table import QUICK, all_measurements, usual_measurements
        from ironmoe.bench.study.options import (
            QUICK_ARMS,
            QUICK_SEEDS,
            QUICK_TRAININGS,
            SEEDS,
            StudyOptions,
            cores,
        )
        from ironmoe.bench.study.run import join_studies, run_study
        from ironmoe.bench.study.work.handed_in import pipeline_of_all

        if from_:
            others = [name for name in ctx.params if name not in WITH_FROM]
            refuse(ctx, others, "--from goes together with --out alone")
            if is_first_process():
                join_studies(from_, out, console)
            return
        if number_started() > 1:
            refuse(ctx, ("processes",), "torchrun says how many processes there are")
        if model:
            refuse(ctx, OF_LADDER, "--model takes the place of the ladder")

        pipeline = pipeline_of_all(model) if model else None
        loaded = load_data(data, image_size, skip_bad, pipeline=pipeline)
        budget = with_radii(quick_budget(Budget()) if quick else Budget(), eps)
        if images is not None:
            budget = at_most(budget, images)
        measured = _chosen("--measurements", measurements, all_measurements())
        measured = measured or (QUICK if quick else usual_measurements())
        measured += ("certificates",) * certificates
        options = StudyOptions(
            data=loaded,
            arms=_chosen("--arms", arms, LADDER) or (QUICK_ARMS if quick else tuple(LADDER)),
            trainings=_chosen("--trainings", trainings, TRAININGS)
            or (QUICK_TRAININGS if quick else TRAININGS),
            seeds=seeds or (QUICK_SEEDS if quick else SEEDS),
            first_seed=first_seed,
            models=tuple(model or ()),
            training=TrainingSettings(eps_255=_train_eps(train_eps), epochs=epochs),
            budget=budget,
            measurements=tuple(dict.fromkeys(measured)),
            processes=processes or cores(),
            expert_parallel=expert_parallel,
            out=out,
        )
        announce(loaded, console)
        announce_radii(options.budget.radii, "Linf", console)
        run_study(options, console, only_plan=plan)


def _train_eps(text: str) -> float:
    """typer.BadParameter: it is no radius of a training."""
    radius = one_radius(text, "Linf", "--train-eps")
    if not 0.01 <= radius <= 255:
        raise typer.BadParameter(f"--train-eps must be from 0.01 to 255, got {text}")
    return radius


def _chosen(option: str, names: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order of the known ones; none if the option is not given.

    Raises:
        typer.BadParameter: one of them is not known.
    """
    if names is None:
        return ()
    known = tuple(known)
    asked = chosen_names(option, names, known, typer.BadParameter)
    return tuple(name for name in known if name in asked)
