"""What timm's ``pretrained_cfg`` says of preprocessing: the rules of ``resolve_data_config`` and of
the evaluation transforms (timm 1.0, timm/data/config.py and transforms_factory.py)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ironmoe.attacks.data.preprocessing import Mode, Preprocessing
from ironmoe.moe.checkpoints.errors import CheckpointError

INPUT_SIZE = (3, 224, 224)
CROP_SHARE = 0.875  # of the resized edge
INTERPOLATION = "bicubic"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# crop mode → how the resized picture fills the larger size
MODES: dict[str, Mode] = {"center": "shortest", "squash": "exact", "border": "longest"}


def preprocessing_of(
    model: nn.Module, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> Preprocessing:
    """The evaluation preprocessing of a model of timm, with its mean and std.

    Args:
        model: has ``pretrained_cfg``, or ``default_cfg`` in old versions.
        size: (height, width) that it was built for, None for its own.
        channels: of its input, None for its own; for other than the three of its mean and std it
            gets their means.

    Raises:
        CheckpointError: the crop mode is not known.
    """
    config = _config(model)
    own = tuple(config.get("input_size") or INPUT_SIZE)
    channels = channels or own[0]
    height, width = size or own[1:]
    share = config.get("crop_pct") or CROP_SHARE
    crop_mode = config.get("crop_mode") or "center"
    if crop_mode not in MODES:
        raise CheckpointError(
            f"crop_mode of {type(model).__name__} must be one of {', '.join(MODES)}, got "
            f"{crop_mode!r}"
        )

    mean, is_own_mean = _of(channels, config.get("mean") or IMAGENET_MEAN)
    std, is_own_std = _of(channels, config.get("std") or IMAGENET_STD)
    averaged = "" if is_own_mean and is_own_std else ", whose mean and std were averaged"
    border = tuple(round(255 * value) for value in mean) if crop_mode == "border" else ()
    return Preprocessing(
        channels=channels,
        resize=(math.floor(height / share), math.floor(width / share)),
        mode=MODES[crop_mode],
        crop=(height, width),
        interpolation=config.get("interpolation") or INTERPOLATION,
        fill=border,
        mean=mean,
        std=std,
        source=f"pretrained_cfg of timm{averaged}",
    )


def _config(model: nn.Module) -> Mapping[str, Any]:
    found = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return found if isinstance(found, Mapping) else vars(found)


def _of(channels: int, values: Sequence[float]) -> tuple[tuple[float, ...], bool]:
    """A number for each channel, and whether these are the values themselves."""
    if len(values) == channels:
        return tuple(values), True
    return (sum(values) / len(values),) * channels, False
