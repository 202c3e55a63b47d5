"""What the command line of ``ironmoe train`` says, checked; and what makes two runs the same
run."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from ironmoe.attacks.balls.ball import NORMS
from ironmoe.attacks.training import TRAINING_METHODS, RegisteredMethod
from ironmoe.attacks.training.inner.lent import Mode
from ironmoe.bench.attack.suite import ROUTING
from ironmoe.bench.common.choices import did_you_mean
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.train.recipe import DTYPES, SCHEDULES, STANDARD, MethodChoice, TrainRecipe
from ironmoe.bench.train.trainee import Trainee


class TrainOptions(NamedTuple):
    """model: as the command names it; expert_parallel: over how many processes the experts of each
    layer are shared out; guard: whether a training against one step is stopped where
    it loses its robustness; attack: whether the chosen weights are attacked at the end;
    attack_images: how many test images, at most."""

    data: ImageData
    model: str
    method: MethodChoice
    recipe: TrainRecipe
    seed: int
    device: torch.device
    out: Path | None
    fsdp: bool = False
    expert_parallel: int = 1
    guard: bool = True
    attack: bool = True
    attack_images: int = 500

    def settings(self, trainee: Trainee) -> dict[str, Any]:
        """What makes two runs the same run. How many processes took part does not, nor how they
        share the weights."""
        return trainee.identity | {
            "data": self.data.name,
            "checksum": self.data.checksum,
            "skipped": self.data.skipped,
            "method": self.method._asdict(),
            "recipe": self.recipe._asdict(),
            "seed": self.seed,
            "guard": self.guard,
            "attack_images": self.attack_images,
            "device": self.device.type,
            "ironmoe": versions()["ironmoe"],
        }


def check_choice(choice: MethodChoice) -> None:
    """Find mistakes in the choice of a method that depend on no model and no data.

    Raises:
        UserError: the message says what, and what is possible.
    """
    _check_name("--method", choice.name, TRAINING_METHODS)
    entry = TRAINING_METHODS[choice.name]
    for option in choice.own:
        if option not in entry.takes:
            takers = [name for name, each in TRAINING_METHODS.items() if option in each.takes]
            raise UserError(
                f"{flag(option)} applies to --method {', '.join(takers)}, not to {choice.name}"
            )
    _check_name("--norm", choice.norm, NORMS)
    _check_name("--mode", choice.mode, get_args(Mode))
    _check_name("--routing", choice.routing, ROUTING)
    defaults, given = MethodChoice()._asdict(), choice._asdict()
    for option in entry.ignores:
        field = "alpha_255" if option == "alpha" else option
        if given[field] != defaults[field]:
            why = (
                "has no attack"
                if choice.name == STANDARD
                else "attacks by the backward pass of training"
            )
            raise UserError(f"{flag(option)} does not apply to --method {choice.name}, which {why}")
    if choice.steps is not None and not takes_steps(entry):
        raise UserError(f"--steps does not apply to --method {choice.name}, which makes one step")
    _check_range("--eps", choice.eps_255, above=0)
    _check_range("--alpha", choice.alpha_255, above=0)
    _check_range("--awp", choice.awp, above=0)
    if not 0 <= choice.label_smoothing < 1:
        raise UserError(
            f"--label-smoothing must be from 0 to below 1, got {choice.label_smoothing:g}"
        )


def check_recipe(recipe: TrainRecipe) -> None:
    """The same of a recipe."""
    _check_name("--schedule", recipe.schedule, SCHEDULES)
    _check_name("--dtype", recipe.dtype, DTYPES)
    _check_range("--learning-rate", recipe.learning_rate, above=0)
    if recipe.ema is not None and not 0 < recipe.ema < 1:
        raise UserError(f"--ema must be above 0 and below 1, got {recipe.ema:g}")
    if recipe.parts > recipe.batch_size:
        raise UserError(
            f"--parts must be at most --batch-size, {recipe.batch_size}, got {recipe.parts}"
        )


def _check_name(option: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise UserError(
            f"{option} must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
        )


def _check_range(option: str, value: float | None, *, above: float) -> None:
    if value is not None and not above < value < float("inf"):
        raise UserError(f"{option} must be finite and above {above:g}, got {value:g}")


def takes_steps(entry: RegisteredMethod) -> bool:
    """Whether the method's attack makes as many steps as one likes. The constructor of another one
    says ``steps=1``."""
    steps = inspect.signature(entry.kind).parameters.get("steps")
    return steps is None or steps.default != 1


def flag(option: str) -> str:
    """An option as the command line has it."""
    return f"--{option.replace('_', '-')}"
