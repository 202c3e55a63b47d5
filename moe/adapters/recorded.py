"""Each layer of experts that came of a dense MLP knows how it was made; the recipe of a model is
read off its layers.

So the record goes wherever the layer goes: with copies, pickles and parts of a model.
"""

import json
from typing import Any

from torch import nn

from ironmoe.moe.adapters.huggingface_saving import keep_recipes
from ironmoe.moe.adapters.recipe import FORMAT, Recipe
from ironmoe.moe.layers.moe import MoE

_NAME = "_ironmoe_made"


class Made:
    """How a layer was made, as JSON can hold it; ``inside`` is where it lies within the MLP whose
    place it took, or within the block that called that MLP's layers."""

    def __init__(self, options: dict[str, Any], inside: str = "") -> None:
        self.options = options
        self.inside = inside

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        keep_recipes(recipe_of_model)


def record(moe: MoE, router: dict[str, Any], options: dict[str, Any], noise: float) -> None:
    """Let the layer know how it was made: encoded keyword arguments of its router and its own."""
    vars(moe)[_NAME] = Made({"router": router, "moe": options, "noise": noise})
    keep_recipes(recipe_of_model)


def record_place(moe: MoE, inside: str) -> None:
    """Let a recorded layer know where it lies within the MLP."""
    vars(moe)[_NAME].inside = inside


def recipe_of_model(model: nn.Module) -> Recipe | None:
    """The recipe that makes the structure of this model out of a dense one; None if no MLP of it
    was upcycled."""
    steps: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        made = vars(module).get(_NAME)
        if made is None:
            continue
        mlp = path.removesuffix(made.inside).removesuffix(".") if made.inside else path
        alike = steps.setdefault(json.dumps(made.options), {"mlps": [], **made.options})
        if mlp not in alike["mlps"]:
            alike["mlps"].append(mlp)
    return {"format": FORMAT, "steps": list(steps.values())} if steps else None
