"""What ``save_pretrained`` writes of an upcycled transformers model: its recipe, in config.json.
It writes no model whose experts are shared out over ranks.

transformers has no hook there that a module could use, so its method is wrapped once, when the
first transformers model is upcycled, comes out of a pickle or is parallelized.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from ironmoe.moe.adapters.recipe import KEY, Recipe

# transformers looks for weights under this name and fails, where nobody has called ``register``: it
# would put fresh dense MLPs in the place of the experts. The weights lie where they always do.
GUARD_KEY = "transformers_weights"
GUARD = "call-ironmoe.moe.huggingface.register-first.safetensors"


def keep_recipes(recipe_of: Callable[[nn.Module], Recipe | None]) -> None:
    """From now on ``save_pretrained`` writes what ``recipe_of(model)`` returns, unless it is None,
    and refuses to write a part of the experts. Without transformers models in this process nothing
    happens."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    save = base.save_pretrained
    if hasattr(save, "_ironmoe"):
        return
    signature = inspect.signature(save)

    @wraps(save)
    def save_pretrained(self: Any, *arguments: Any, **options: Any) -> Any:
        given = signature.bind(self, *arguments, **options).arguments
        if given.get("state_dict") is None:
            _check_whole(self)
        recipe = recipe_of(self)
        if recipe is None:
            return save(self, *arguments, **options)
        if given.get("push_to_hub"):
            raise ValueError(
                "push_to_hub must be False for an upcycled model, got True: call "
                "model.push_to_hub(…), which saves it with its recipe"
            )
        result = save(self, *arguments, **options)
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        here = given.get("is_main_process", True)
        if hasattr(self, "should_save_on_this_rank"):  # of a model that is shared out
            here = self.should_save_on_this_rank(here)
        if here and not only_adapters:
            _write(Path(given["save_directory"]) / "config.json", recipe)
        return result

    save_pretrained._ironmoe = True  # type: ignore[attr-defined]
    base.save_pretrained = save_pretrained


def _check_whole(model: nn.Module) -> None:
    """ValueError if the experts are shared out: to gather them is an exchange, which would wait for
    ever where one rank saves alone."""
    if any(getattr(module, "expert_parallel", None) is not None for module in model.modules()):
        raise ValueError(
            "state_dict must hold the whole weights of a model whose experts are shared out over "
            "ranks, got None: let each rank call torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and "
            "save_pretrained with what it returns"
        )


def _write(path: Path, recipe: Recipe) -> None:
    """Add the recipe to a config.json, at once or not at all."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {KEY: recipe, GUARD_KEY: GUARD}
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    new.replace(path)
