"""Upcycled models come back from ``from_pretrained``: the recipe in config.json is followed between
the making of the dense model and the loading of its weights."""

import copy
import json
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from ironmoe.moe.adapters.huggingface_saving import GUARD_KEY
from ironmoe.moe.adapters.recipe import KEY, Recipe, steps_of
from ironmoe.moe.adapters.upcycle import upcycle_by_recipe
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.selection_bias import WithSelectionBias

# What ``from_pretrained`` takes to find a file.
_WHERE = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")


def follow_recipes() -> None:
    """From now on ``from_pretrained`` of each transformers model and Auto class follows recipes.
    Folders without one load as before."""
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    load = base.from_pretrained.__func__
    if hasattr(load, "_ironmoe"):
        return

    @wraps(load)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any
    ) -> Any:
        config = _config(pretrained_model_name_or_path, options)
        if KEY not in config:
            return load(cls, pretrained_model_name_or_path, *arguments, **options)
        recipe = config[KEY]
        steps_of(recipe)
        want_info = options.pop("output_loading_info", False)
        own = (
            cls.config_class is not None and config.get("model_type") == cls.config_class.model_type
        )
        model, info = load(
            _upcycled(cls, recipe),
            pretrained_model_name_or_path,
            *arguments,
            output_loading_info=True,
            **_without_guard(options, own),
        )
        model.__class__ = cls
        _finish(model, info)
        return (model, info) if want_info else model

    from_pretrained._ironmoe = True  # type: ignore[attr-defined]
    base.from_pretrained = classmethod(from_pretrained)


def _config(name: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The config.json behind a name; {} where there is none, which is transformers' error."""
    from transformers import PreTrainedConfig

    given = options.get("config")
    if isinstance(given, PreTrainedConfig):
        if hasattr(given, KEY):
            return {KEY: getattr(given, KEY), "model_type": given.model_type}
        if name is None or not Path(name).is_dir():
            return {}  # an Auto class has read it already
        given = None
    where = {key: options[key] for key in _WHERE if key in options}
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(given or name, **where)[0]
    except (OSError, ValueError, TypeError, json.JSONDecodeError):
        return {}
    return config


def _without_guard(options: dict[str, Any], own: bool) -> dict[str, Any]:
    """The options, in which weights lie under their usual name again. ``own``: whether the
    config.json is that of the class, not of a model around it."""
    config = options.get("config")
    if hasattr(config, "to_dict"):
        config = copy.deepcopy(config)
        for key in (KEY, GUARD_KEY):
            vars(config).pop(key, None)
        return {**options, "config": config}
    return {**options, GUARD_KEY: None} if own else options


def _upcycled(cls: Any, recipe: Recipe) -> Any:
    """The class, whose instances have experts from the start, so that transformers loads them as it
    loads any weights: by dtype, device map and shard."""

    def __init__(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        cls.__init__(self, config, *arguments, **options)
        upcycle_by_recipe(self, _in_terms_of(self, recipe))

    kept = {"selection_bias", *(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())}
    body = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "_keep_in_fp32_modules_strict": kept,
    }
    return type(cls.__name__, (cls,), body)


def _in_terms_of(model: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe with the paths that its MLPs have in this model: a model with a head knows its
    body by a prefix, which the body alone has not."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def path(mlp: str) -> str:
        for candidate in (mlp, mlp.removeprefix(prefix), prefix + mlp):
            if candidate in known:
                return candidate
        return mlp

    steps = [{**step, "mlps": [path(mlp) for mlp in step["mlps"]]} for step in recipe["steps"]]
    return {**recipe, "steps": steps}


def _finish(model: Any, info: dict[str, Any]) -> None:
    """What transformers does not do; ValueError if weights of experts were missing."""
    for key in (KEY, GUARD_KEY):  # the layers know it
        vars(model.config).pop(key, None)
    experts = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, MoE))
    missing = sorted(name for name in info["missing_keys"] if name.startswith(experts))
    if missing:
        raise ValueError(
            f"the weights must be those of the upcycled {type(model).__name__}, got none for "
            f"{missing[0]} and {len(missing) - 1} more"
        )
    for router in model.modules():
        if isinstance(router, WithSelectionBias) and router.selection_bias is not None:
            router.to(router.selection_bias.device)  # what it counts is no buffer
