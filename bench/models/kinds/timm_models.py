"""``timm:NAME?checkpoint=PATH``: a model of timm, with the preprocessing that timm gives it."""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ironmoe.bench.common.errors import told
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.timm_config import (
    preprocessing_of,
    size_for_test,
    takes_one_size,
)
from ironmoe.bench.models.kinds.timm_weights import load_weights
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.offline import nothing_downloaded
from ironmoe.bench.models.packages import imported
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.moe.checkpoints.errors import CheckpointError

RANDOM = "random weights"


class Made(NamedTuple):
    """A model of timm, and what it was made by.

    arguments: of ``create_model``; size: (height, width) of its images, None for its own.
    """

    model: nn.Module
    arguments: dict[str, Any]
    size: tuple[int, int] | None


@register_kind("timm", form="timm:NAME?checkpoint=FILE")
def load_timm(source: Source) -> LoadedModel:
    """``timm.create_model(NAME, …)`` with the weights of a file. ``test_size=true`` takes the size
    and the crop by which timm measures accuracy. What else the query sets are arguments of
    create_model, such as num_classes or img_size.

    Raises:
        CheckpointError: timm cannot be imported, has no such model or argument, or the file does
            not fit.
    """
    timm = imported("timm", source)
    is_for_test = bool(source.switch("test_size"))
    arguments = source.arguments
    arguments.pop("test_size", None)
    checkpoint = arguments.pop("checkpoint", None)
    if "pretrained" in arguments:
        raise CheckpointError(
            f"{source} must name its weights by checkpoint=FILE, got pretrained="
            f"{arguments['pretrained']}: nothing is downloaded. To get the file elsewhere: python "
            f"-c \"import timm, torch; torch.save(timm.create_model('{source.path}', "
            "pretrained=True).state_dict(), 'weights.pth')\""
        )

    made = _made(timm, source, arguments, checkpoint is not None, is_for_test)
    model = made.model
    if checkpoint is not None:
        load_weights(timm, source, made.arguments, model, Path(str(checkpoint)))
    rules = preprocessing_of(
        model, size=made.size, channels=arguments.get("in_chans"), is_for_test=is_for_test
    )
    one_size = rules.crop if takes_one_size(model, made.arguments) else None
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return LoadedModel(
        Classifier(model, rules.mean, rules.std),
        source.path if checkpoint is not None else f"{source.path} ({RANDOM})",
        None if one_size is None else (rules.channels, *one_size),
        list(names) if names and len(names) == getattr(model, "num_classes", 0) else None,
        facts_of(source.path, weights=RANDOM if checkpoint is None else Path(str(checkpoint)).name),
        pipeline=rules,
        size_key="img_size",
    )


def _made(
    timm: Any, source: Source, arguments: dict[str, Any], has_weights: bool, is_for_test: bool
) -> Made:
    """The model for the size that its name asks for, else for the size of tests, else for that of
    the data. Weights belong to a size, so that a model with weights keeps its own, unless it takes
    any."""
    asked = arguments.get("img_size")
    if asked is not None:
        size = _read_size(source, asked)
        return _for_size(timm, source, arguments, size)

    wanted = source.image_size
    if is_for_test or has_weights:
        model = _create(timm, source, arguments)
        if is_for_test:
            wanted = _size_for_test(source, model)
        if not takes_one_size(model, arguments):
            return Made(model, arguments, wanted)
        if not is_for_test:
            return Made(model, arguments, None)
    if wanted is None:
        return Made(_create(timm, source, arguments), arguments, None)

    try:
        return _for_size(timm, source, arguments, wanted)
    except CheckpointError as error:
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error):
            raise
    return Made(_create(timm, source, arguments), arguments, wanted)  # it takes any size


def _size_for_test(source: Source, model: nn.Module) -> tuple[int, int]:
    size = size_for_test(model)
    if size is None:
        raise CheckpointError(
            f"{source} must have a test_input_size or test_crop_pct in its pretrained_cfg for "
            "test_size=true, got neither"
        )
    return size


def _for_size(timm: Any, source: Source, arguments: dict[str, Any], size: tuple[int, int]) -> Made:
    height, width = size
    arguments = arguments | {"img_size": height if height == width else size}
    return Made(_create(timm, source, arguments), arguments, size)


def _read_size(source: Source, value: Any) -> tuple[int, int]:
    """(height, width) of 240, or of "240x320"."""
    try:
        sides = tuple(int(side) for side in re.split(r"[x,×]", str(value)))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise CheckpointError(
            f"{source} must have an img_size such as 224, or 224x192 for height × width, got "
            f"{value!r}"
        )
    return sides[0], sides[-1]


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
