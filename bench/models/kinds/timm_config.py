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
    model: nn.Module,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    is_for_test: bool = False,
) -> Preprocessing:
    """The evaluation preprocessing of a model of timm, with its mean and std.

    Args:
        model: has ``pretrained_cfg``, or ``default_cfg`` in old versions.
        size: (height, width) that it was built for, None for its own.
        is_for_test: cut out what ``test_crop_pct`` says, as timm's validate.py does.
        channels: of its input, None for its own; for other than the three of its mean and std it
            gets their means.

    Raises:
        CheckpointError: the crop mode is not known.
    """
    config = _config(model)
    own = tuple(config.get("input_size") or INPUT_SIZE)
    channels = channels or own[0]
    height, width = size or own[1:]
    own_share = config.get("crop_pct") or CROP_SHARE
    share = (is_for_test and config.get("test_crop_pct")) or own_share
    crop_mode = config.get("crop_mode") or "center"
    if crop_mode not in MODES:
        raise CheckpointError(
            f"crop_mode of {type(model).__name__} must be one of {', '.join(MODES)}, got "
            f"{crop_mode!r}"
        )

    mean, is_own_mean = _of(channels, config.get("mean") or IMAGENET_MEAN)
    std, is_own_std = _of(channels, config.get("std") or IMAGENET_STD)
    averaged = "" if is_own_mean and is_own_std else ", whose mean and std were averaged"
    unused = "" if is_for_test or size is not None else _unused(config, own[1:], own_share)
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
        source=f"pretrained_cfg of timm{averaged}{unused}",
    )


def size_for_test(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) by which timm's validate.py measures accuracy; None where the config has no
    rules of its own for tests."""
    config = _config(model)
    own = config.get("input_size") if config.get("test_crop_pct") else None
    found = config.get("test_input_size") or own
    return None if found is None else (int(found[1]), int(found[2]))


def takes_one_size(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a model that was made by these arguments takes images of its size alone."""
    is_free = arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False
    return bool(_config(model).get("fixed_input_size")) and not is_free


def _unused(config: Mapping[str, Any], own: Sequence[int], share: float) -> str:
    """What the config says of tests, if that is something else."""
    _, *size = config.get("test_input_size") or (0, *own)
    test_share = config.get("test_crop_pct") or share
    if (tuple(size), test_share) == (tuple(own), share):
        return ""
    return (
        f"; it names {size[0]} × {size[1]} and crop_pct {test_share:g} for tests, which timm's "
        "validate.py takes: test_size=true does, too"
    )


def _config(model: nn.Module) -> Mapping[str, Any]:
    found = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return found if isinstance(found, Mapping) else vars(found)


def _of(channels: int, values: Sequence[float]) -> tuple[tuple[float, ...], bool]:
    """A number for each channel, and whether these are the values themselves."""
    if len(values) == channels:
        return tuple(values), True
    return (sum(values) / len(values),) * channels, False
