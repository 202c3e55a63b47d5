"""The trainings of the ladder: one recipe for all arms, standard or adversarial."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ironmoe.bench.common.checkpoints import save_weights
from ironmoe.bench.common.files import slug, write_atomically
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.study.ladder.arms import LADDER, Size, arguments
from ironmoe.bench.study.ladder.initial import new_model
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.recipe import STANDARD, MethodChoice, TrainRecipe
from ironmoe.bench.train.rows import split
from ironmoe.bench.train.trainer import train_for_study

PGD_AT = "pgd-at"
TRAININGS = (STANDARD, PGD_AT)


class TrainingSettings(NamedTuple):
    """What all trainings share. eps_255: the radius of adversarial training, in units of 1/255 of
    the pixel range; steps: of its inner attack, of eps / 2 each."""

    size: Size = Size()
    epochs: int = 12
    batch_size: int = 100
    learning_rate: float = 2e-3
    eps_255: float = 25.5
    steps: int = 4

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"size": self.size._asdict()}

    @property
    def recipe(self) -> TrainRecipe:
        return TrainRecipe(
            epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate
        )

    def choice(self, training: str) -> MethodChoice:
        """The method of one of TRAININGS."""
        if training == STANDARD:
            # The radius is that of the held-out figures in the curves.
            return MethodChoice(name=STANDARD, eps_255=self.eps_255)
        return MethodChoice(
            name=training, eps_255=self.eps_255, steps=self.steps, alpha_255=self.eps_255 / 2
        )


class ModelRun(NamedTuple):
    """One model of the ladder. arm: its name in LADDER; training: one of TRAININGS."""

    arm: str
    training: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{slug(self.arm)}-{slug(self.training)}-seed{self.seed}"


def train_model(
    run: ModelRun,
    data: ImageData,
    settings: TrainingSettings,
    folder: Path,
    console: Console,
) -> Path:
    """The file with the trained weights, which ``ironmoe attack`` takes, too. Models are trained
    unless they are there; a training that was interrupted goes on from its last epoch."""
    file = folder / f"{run.name}.safetensors"
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)

    shape, classes = tuple(data.images.shape[1:]), len(data.classes)
    model = new_model(LADDER[run.arm], shape, classes, settings.size, run.seed)
    recipe = settings.recipe
    batches = recipe.steps_of_epoch(len(split(data).trained))
    trained = train_for_study(
        model,
        data,
        settings.choice(run.training),
        recipe,
        seed=run.seed,
        state_file=folder / f"{run.name}.state",
        display=Display(console, epochs=recipe.epochs, batches=batches, trained_on="right"),
    )

    extra = {
        "name": run.name,
        "seed": run.seed,
        "seconds": trained.seconds,
        "data": data.name,
        "checksum": data.checksum,
        "classes": data.classes,
        "run": run._asdict(),
        "training": {
            "chosen_epoch": trained.chosen,
            "warnings": trained.warnings,
            "curves": trained.curves,
        },
    }
    built_from = arguments(LADDER[run.arm], shape, classes, settings.size)
    write_atomically(file, save_weights(trained.weights, built_from, extra))
    return file
