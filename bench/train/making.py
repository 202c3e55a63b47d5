"""From names and options to a method of adversarial training for a model."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ironmoe.attacks.training import AWP, TRAINING_METHODS, CollapseAlarm, TrainingMethod
from ironmoe.attacks.training.checks import BATCH_NORMS
from ironmoe.bench.attack.suite import ROUTING
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.train.options import takes_steps
from ironmoe.bench.train.recipe import MethodChoice, TrainRecipe
from ironmoe.moe import CheckpointError
from ironmoe.moe.routing.routed_layers import routing_sites

STEPS = 4  # of the inner attack, where the user gives none
FIRST_LOOK = 20  # steps before the first look at routers


def make_method(
    choice: MethodChoice, recipe: TrainRecipe, model: nn.Module, *, batches: int
) -> tuple[TrainingMethod, list[str]]:
    """The method, and what it warns of. ``batches``: of the whole training; eps grows over the
    first half of them.

    Raises:
        UserError: the method does not suit the model, or an option has a wrong value.
    """
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"{type(model).__name__} must have weights that require gradients")
    entry = TRAINING_METHODS[choice.name]
    for option, name, needs in (
        ("--method", choice.name, entry.needs_experts),
        ("--routing", choice.routing, choice.routing != "free"),
    ):
        if needs and not routing_sites(model):
            raise UserError(
                f"{option} {name} needs a model with experts, and this one has none; take --model "
                "v-moe"
            )
    if recipe.images_of_part < 2 and has_batch_norm(model):
        raise UserError(
            "--batch-size / --parts must be at least 2 for a model with batch norm, got "
            f"{recipe.batch_size} / {recipe.parts}"
        )

    settings: dict[str, Any] = {
        "norm": choice.norm,
        "alpha": choice.alpha,
        "mode": choice.mode,
        "routing": None if choice.routing == "free" else ROUTING[choice.routing](),
        "ramp_steps": batches // 2,
        "label_smoothing": choice.label_smoothing,
        "autocast_dtype": recipe.autocast_dtype,
        # Also in a short training, but not before routers have learnt anything.
        "alarm": CollapseAlarm(min(50, max(FIRST_LOOK, batches // 4))),
    }
    if takes_steps(entry):
        settings["steps"] = STEPS if choice.steps is None else choice.steps

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            method = entry.kind(model, choice.eps, **settings | choice.own)
            if choice.awp is not None:
                method = AWP(method, gamma=choice.awp, warmup_steps=method.ramp_steps)
        except (TypeError, ValueError) as error:
            raise UserError(f"--method {choice.name}: {error}") from error
    return method, [str(warning.message) for warning in caught]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether images of a batch share the statistics of a layer."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Inside the block, what the method ``name`` finds wrong with model or images becomes a message
    of one line. A bug keeps its traceback."""
    try:
        yield
    except CheckpointError:
        raise  # of the state file, which no method has anything to do with
    except (TypeError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("ironmoe."):
            raise
        raise UserError(f"--method {name}: {error}") from error
