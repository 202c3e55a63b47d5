"""``torchvision:NAME?weights=DEFAULT``: a model of torchvision, with the preset of its weights."""

import difflib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.bench.common.errors import told
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.torchvision_rules import interpolation_of, resized
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.offline import nothing_downloaded
from ironmoe.bench.models.packages import imported
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.bench.models.weights import load_file_into
from ironmoe.moe.checkpoints.errors import CheckpointError

RANDOM = "random weights"
DEFAULT = "DEFAULT"

# what torchvision sets beside the number of classes where it loads these weights itself
WITH_WEIGHTS = {
    "inception_v3": {"transform_input": True, "init_weights": False},
    "googlenet": {"transform_input": True, "init_weights": False, "aux_logits": False},
}


@register_kind("torchvision", form="torchvision:NAME?weights=DEFAULT")
def load_torchvision(source: Source) -> LoadedModel:
    """``torchvision.models.get_model(NAME, …)``.

    ``weights=NAME`` takes the file that torchvision keeps for these weights in torch.hub's folder;
    with ``checkpoint=FILE`` that file is taken instead. Pixels, normalization and classes are those
    of the weights, by default of DEFAULT. What else the query sets are arguments of the model.

    Raises:
        CheckpointError: torchvision cannot be imported, has no such model, weights or argument, or
            a file is missing or does not fit.
    """
    models = imported("torchvision.models", source)
    arguments = source.arguments
    checkpoint, asked = (arguments.pop(key, None) for key in ("checkpoint", "weights"))
    weights = _weights(models, source, asked)

    if checkpoint is not None:
        own = {} if asked is None else _arguments_of(source, weights)
        model = _made(models, source, None, own | arguments)
        load_file_into(model, Path(str(checkpoint)))
    else:
        chosen = None if asked is None else weights
        if chosen is not None:
            _check_file(source, chosen)
        model = _made(models, source, chosen, arguments)

    has_weights = checkpoint is not None or asked is not None
    rules = None if weights is None else _preset(weights, source)
    return LoadedModel(
        Classifier(model) if rules is None else Classifier(model, rules.mean, rules.std),
        source.path if has_weights else f"{source.path} ({RANDOM})",
        None,
        None if weights is None or not _fits(model, weights) else _classes(weights),
        facts_of(source.path, weights=str(checkpoint or asked or RANDOM)),
        pipeline=rules,
    )


def _weights(models: Any, source: Source, asked: str | None) -> Any:
    """The member of the model's enumeration of weights; None if it has none and none was asked."""
    try:
        table = models.get_model_weights(source.path)
    except ValueError as error:
        known = models.list_models()
        if source.path in known:
            return None
        near = difflib.get_close_matches(source.path, known, n=3)
        raise CheckpointError(
            f"{source} must name a model of torchvision, got {source.path!r}"
            + (f"; close: {', '.join(near)}" if near else "")
        ) from error

    names = list(table.__members__)
    name = str(asked or DEFAULT).rpartition(".")[2]
    if name not in names:
        if asked is None:
            return None
        raise CheckpointError(
            f"{source} must have weights that are one of {', '.join(names)}, got {asked!r}"
        )
    return table[name]


def _check_file(source: Source, weights: Any) -> None:
    """CheckpointError unless torchvision's own file is on disk."""
    name = Path(urlparse(weights.url).path).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        raise CheckpointError(
            f"{source} needs the file {file}, which does not exist, and nothing is downloaded; get "
            f"it from {weights.url}, or name another place by checkpoint=FILE"
        )


def _made(models: Any, source: Source, weights: Any, arguments: dict[str, Any]) -> nn.Module:
    try:
        with nothing_downloaded(source):
            made: nn.Module = models.get_model(source.path, weights=weights, **arguments)
            return made
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source} cannot be made: {told(error)}") from error


def _arguments_of(source: Source, weights: Any) -> dict[str, Any]:
    """What a model of these weights is built with."""
    classes = _classes(weights)
    count = {} if classes is None else {"num_classes": len(classes)}
    side = weights.meta.get("min_size", (0, 0))[0] if source.path.startswith("vit_") else 0
    return count | ({"image_size": side} if side else {}) | WITH_WEIGHTS.get(source.path, {})


def _preset(weights: Any, source: Source) -> Preprocessing:
    """The rules of the ``ImageClassification`` preset: resize, crop, mean and std."""
    preset = weights.transforms()
    name = str(weights)
    if not all(hasattr(preset, field) for field in ("resize_size", "crop_size", "mean", "std")):
        raise CheckpointError(
            f"{source} must be an image classifier, got weights {name} for {type(preset).__name__}"
        )
    height, width = (preset.crop_size * 2)[:2]
    rules = Preprocessing(
        crop=(height, width), mean=tuple(preset.mean), std=tuple(preset.std), source=name
    )
    return resized(rules, preset.resize_size, interpolation_of(preset.interpolation, source))


def _classes(weights: Any) -> list[str] | None:
    names = weights.meta.get("categories")
    return None if names is None else [str(name) for name in names]


def _fits(model: nn.Module, weights: Any) -> bool:
    """Whether the model still has the classes of the weights: its last bias has one for each."""
    last = list(model.state_dict().values())[-1:]
    names = _classes(weights)
    return bool(last) and names is not None and len(last[0]) == len(names)
