"""The trainings of the part ``methods``: each is (model, method, seed), goes through the loop of
``ironmoe train``, and is evaluated."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ironmoe.attacks.registry import named_attacks
from ironmoe.attacks.training import TRAINING_METHODS
from ironmoe.bench.benchmarks.training.evaluation import (
    MEASURES,
    PGD_STEPS,
    TARGETED,
    EvaluationSettings,
    evaluated,
    is_accuracy,
)
from ironmoe.bench.benchmarks.training.models import DENSE, model_arguments, new_model
from ironmoe.bench.common.checkpoints import load_checkpoint, save_weights
from ironmoe.bench.common.files import slug, write_atomically
from ironmoe.bench.common.rows.kept import Kept
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.recipe import MethodChoice, TrainRecipe
from ironmoe.bench.train.rows import split
from ironmoe.bench.train.trainer import Trained, train_for_study
from ironmoe.moe import VMoE

CPU = torch.device("cpu")
Row = dict[str, Any]
TIMED = 100  # images of a pass that is timed
STEPS = 4  # of inner attacks, of eps / 2 each
SHIFTS = False  # with them, small models are still far from trained after 12 epochs


class Variant(NamedTuple):
    """One line of the study: a method with what is put around it.

    method: its name in the registry; steps: of its inner attack, None for those that make one;
    updates: that it makes of each batch with all weights, by which the epochs are divided;
    eps_share: the radius of training and evaluation, as a multiple of the study's; awp: gamma; ema:
    decay of the average.
    """

    method: str
    steps: int | None = None
    updates: int = 1
    eps_share: float = 1.0
    awp: float | None = None
    ema: float | None = None

    @property
    def needs_experts(self) -> bool:
        return TRAINING_METHODS[self.method].needs_experts


VARIANTS = {
    "standard": Variant("standard"),
    "pgd-at": Variant("pgd-at", STEPS),
    "fgsm-rs": Variant("fgsm-rs"),
    "n-fgsm": Variant("n-fgsm"),
    "free": Variant("free", updates=4),
    "trades": Variant("trades", STEPS),
    "mart": Variant("mart", STEPS),
    "pgd-at+awp": Variant("pgd-at", STEPS, awp=0.01),
    "pgd-at+ema": Variant("pgd-at", STEPS, ema=0.995),
    "alternating": Variant("alternating", STEPS),
    "second-ranked": Variant("second-ranked", STEPS),
    "routing-consistency": Variant("routing-consistency", STEPS),
    # The larger the radius, the sooner a model learns to answer one step alone.
    "pgd-at-3eps": Variant("pgd-at", STEPS, eps_share=3.0),
    "fgsm-rs-3eps": Variant("fgsm-rs", eps_share=3.0),
}


class StudySettings(NamedTuple):
    """epochs: passes over the training images; evaluation: its eps is that of the training, too."""

    epochs: int = 12
    evaluation: EvaluationSettings = EvaluationSettings()

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        recipe = {"epochs": self.epochs, "inner_steps": STEPS, "shifts": SHIFTS}
        return recipe | self.evaluation._asdict()


class Run(NamedTuple):
    """One training. model: one of MODELS; method: one of VARIANTS."""

    model: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{slug(self.model)}-{slug(self.method)}-seed{self.seed}"

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.method]

    def is_possible(self) -> bool:
        """Whether the method suits the model."""
        return self.model in DENSE or not self.variant.needs_experts


def expected_ends(
    runs: Sequence[Run], data: ImageData, settings: StudySettings
) -> tuple[float, float]:
    """Seconds that these trainings and their evaluations take, about: if every attacked image falls
    at once, and if every one holds."""
    trained, tested = len(split(data).trained), len(data.split()[1])
    of = settings.evaluation
    targets = min(named_attacks()[TARGETED].settings["targets"], len(data.classes) - 1)
    attacked = PGD_STEPS * min(of.pgd_images, tested)
    attacked += of.apgd_steps * targets * min(of.apgd_images, tested)

    seconds = {model: _pass_seconds(model, data) for model in {run.model for run in runs}}
    least = most = 0.0
    for run in runs:
        of_batch = run.variant.updates if run.variant.updates > 1 else _inner_steps(run) + 1
        training = _epochs(run, settings) * of_batch * trained
        least += seconds[run.model] * (training + tested)
        most += seconds[run.model] * (training + tested + attacked)
    return least, most


def are_whole(rows: Sequence[Row]) -> bool:
    """Whether there is one row, whose accuracies are those of its images."""
    return len(rows) == 1 and all(is_accuracy(row.get(name)) for row in rows for name in MEASURES)


def _inner_steps(run: Run) -> int:
    """Passes before the outer one."""
    if run.variant.steps is not None:
        return run.variant.steps
    return int(TRAINING_METHODS[run.variant.method].single_step)


def _pass_seconds(model: str, data: ImageData) -> float:
    """About, of one image in a batch, forward and backward."""
    network = new_model(model, data, seed=0)
    images = data.images[data.split()[0][:TIMED]]
    seconds = 0.0
    for _ in range(2):  # the first one makes what the second finds
        start = time.perf_counter()
        network(images).sum().backward()
        seconds = time.perf_counter() - start
    return seconds / len(images)


def do(run: Run, data: ImageData, settings: StudySettings, kept: Kept, console: Console) -> Row:
    """Train and evaluate, unless an earlier command did, and return the row.

    A finished training leaves its weights in the folder, so that an interrupted evaluation does not
    train again; a training that was interrupted goes on from its last epoch.
    """
    found = kept.read(run.name)
    if found is None:
        kept.begin(run.name)
        model, training = _trained(run, data, settings, kept, console)
        eps = settings.evaluation.eps * run.variant.eps_share
        accuracies = evaluated(model, data, settings.evaluation._replace(eps=eps))
        row = run._asdict() | {"eps": eps} | accuracies | training
        found = kept.write(run.name, [row])
    return dict(found["rows"][0])


def _trained(
    run: Run, data: ImageData, settings: StudySettings, kept: Kept, console: Console
) -> tuple[VMoE, Row]:
    """The model in eval mode, and what is said of its training."""
    file = kept.folder / f"{run.name}.safetensors"
    if file.is_file():
        model, extra = load_checkpoint(file, CPU)
        return model, extra["training"]

    model = new_model(run.model, data, run.seed)
    trained = _train(run, model, data, settings, kept.folder / f"{run.name}.state", console)
    training = {
        "train_seconds": trained.seconds,
        "chosen_epoch": trained.chosen,
        "stopped": trained.stopped,
        "warnings": trained.warnings,
        "curves": trained.curves,
    }
    extra = {"name": run.name, "classes": data.classes, "training": training}
    write_atomically(file, save_weights(trained.weights, model_arguments(run.model, data), extra))
    model.load_state_dict(trained.weights)
    return model.eval(), training


def _train(
    run: Run,
    model: VMoE,
    data: ImageData,
    settings: StudySettings,
    state_file: Path,
    console: Console,
) -> Trained:
    """The loop of ``ironmoe train``, with the recipe that all methods share."""
    variant = run.variant
    eps = settings.evaluation.eps * variant.eps_share
    recipe = TrainRecipe(epochs=_epochs(run, settings), ema=variant.ema, shifts=SHIFTS)
    choice = MethodChoice(
        name=variant.method,
        eps_255=255 * eps,
        steps=variant.steps,
        alpha_255=None if variant.steps is None else 255 * eps / 2,
        awp=variant.awp,
    )
    batches = recipe.steps_of_epoch(len(split(data).trained))
    display = Display(console, epochs=recipe.epochs, batches=batches, trained_on="right")
    return train_for_study(
        model, data, choice, recipe, seed=run.seed, state_file=state_file, display=display
    )


def _epochs(run: Run, settings: StudySettings) -> int:
    """As many as leave every method the same number of updates."""
    return max(1, settings.epochs // run.variant.updates)
