"""Each layer of experts that took the place of a dense MLP knows that it did; the recipe of a model
is read off its layers, as they are now.

So it goes wherever the layers go: with copies, pickles and parts of a model.
"""

import json
from typing import Any

from torch import nn

from ironmoe.moe.adapters.huggingface_saving import keep_recipes
from ironmoe.moe.adapters.recipe import FORMAT, Recipe, layer_of, router_of
from ironmoe.moe.layers.moe import MoE

_NAME = "_ironmoe_origin"


class Origin:
    """Where a layer comes from.

    noise: what was added to the copies of the MLP.
    inside: where the layer lies within the MLP whose place it took, or within the block that called
        that MLP's layers; "" for the place itself.
    """

    def __init__(self, noise: float, inside: str) -> None:
        self.noise = noise
        self.inside = inside

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        keep_recipes(recipe_of_model)


def record(moe: MoE, noise: float, inside: str) -> None:
    """Let the layer know where it comes from."""
    vars(moe)[_NAME] = Origin(noise, inside)
    keep_recipes(recipe_of_model)


def recipe_of_model(model: nn.Module) -> Recipe | None:
    """The recipe that makes the structure of this model out of a dense one; None if no MLP of it
    was upcycled. TypeError if no recipe can hold an option of a layer."""
    steps: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        origin = vars(module).get(_NAME)
        if origin is None or not isinstance(module, MoE):
            continue
        mlp = path.removesuffix(origin.inside).removesuffix(".") if origin.inside else path
        made = {"router": router_of(module), "moe": layer_of(module), "noise": origin.noise}
        alike = steps.setdefault(json.dumps(made), {"mlps": [], **made})
        if mlp not in alike["mlps"]:
            alike["mlps"].append(mlp)
    return {"format": FORMAT, "steps": list(steps.values())} if steps else None
