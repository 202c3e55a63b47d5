"""``timm:NAME?checkpoint=PATH``: a model of timm, with the preprocessing that timm gives it."""

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from ironmoe.bench.common.errors import told
from ironmoe.bench.common.query import read_value
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.timm_config import preprocessing_of
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.offline import nothing_downloaded
from ironmoe.bench.models.packages import imported
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.bench.models.weights import load_file_into
from ironmoe.moe.checkpoints.errors import CheckpointError

RANDOM = "random weights"


@register_kind("timm", form="timm:NAME?checkpoint=FILE")
def load_timm(source: Source) -> LoadedModel:
    """``timm.create_model(NAME, …)`` with the weights of a file. What else the query sets are
    arguments of create_model, such as num_classes or img_size.

    Raises:
        CheckpointError: timm cannot be imported, has no such model or argument, or the file does
            not fit.
    """
    timm = imported("timm", source)
    arguments = {key: read_value(text) for key, text in source.query.items()}
    checkpoint = arguments.pop("checkpoint", None)
    if "pretrained" in arguments:
        raise CheckpointError(
            f"{source} must name its weights by checkpoint=FILE, got pretrained="
            f"{arguments['pretrained']}: nothing is downloaded. To get the file elsewhere: python "
            f"-c \"import timm, torch; torch.save(timm.create_model('{source.path}', "
            "pretrained=True).state_dict(), 'weights.pth')\""
        )

    model, size = _made(timm, source, arguments)
    if checkpoint is not None:
        load_file_into(model, Path(str(checkpoint)))
    rules = preprocessing_of(model, size=size, channels=arguments.get("in_chans"))
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return LoadedModel(
        Classifier(model, rules.mean, rules.std),
        source.path if checkpoint is not None else f"{source.path} ({RANDOM})",
        None,
        list(names) if names and len(names) == getattr(model, "num_classes", 0) else None,
        facts_of(source.path, weights=RANDOM if checkpoint is None else Path(str(checkpoint)).name),
        pipeline=rules,
    )


def _made(
    timm: Any, source: Source, arguments: dict[str, Any]
) -> tuple[nn.Module, tuple[int, int] | None]:
    """The model, and the size it was built for, None for its own. One that is built for a size is
    built for that of the data."""
    asked = arguments.get("img_size")
    if asked is not None:
        size = (asked, asked) if isinstance(asked, int) else tuple(asked)
        return _create(timm, source, arguments), size
    if source.image_size is None:
        return _create(timm, source, arguments), None

    height, width = source.image_size
    side = height if height == width else (height, width)
    try:
        return _create(timm, source, arguments | {"img_size": side}), source.image_size
    except CheckpointError as error:
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error):
            raise
    return _create(timm, source, arguments), source.image_size  # it takes images of any size


def _create(timm: Any, source: Source, arguments: dict[str, Any]) -> nn.Module:
    try:
        with nothing_downloaded(source):
            made: nn.Module = timm.create_model(source.path, pretrained=False, **arguments)
            return made
    except CheckpointError:
        raise
    except Exception as error:
        known = timm.list_models()
        if source.path.partition(".")[0] in known:
            raise CheckpointError(f"{source} cannot be made: {told(error)}") from error
        near = difflib.get_close_matches(source.path, known, n=3)
        raise CheckpointError(
            f"{source} must name a model of timm {timm.__version__}, got {source.path!r}"
            + (f"; close: {', '.join(near)}" if near else "")
        ) from error
