"""The device on which a model is attacked."""

from typing import Any

import torch
from torch import nn


def device_of(model: Any) -> torch.device | None:
    """Where the weights of a model are; None: it has none, or is no module."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if weight is None else weight.device


def chosen_device(device: torch.device | str | None, model: Any) -> torch.device | None:
    """Where images are sent before the model sees them: the device of its weights, or, for a model
    without weights, the one that the user names; None: images stay where they are.

    Raises:
        TypeError, ValueError: ``device`` is no device, or not that of the weights.
    """
    there = device_of(model)
    if device is None:
        return there
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"device must be a torch device, got {device!r}: {error}") from None

    if there is not None and not _is_same(wanted, there):
        raise ValueError(
            f"device must be that of the model's weights, {there}, got {str(wanted)!r}: move the "
            f"model with model.to({str(wanted)!r}), or leave device out"
        )
    if there is not None:
        return there
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # of a build of torch without this device
        raise ValueError(
            f"device must be one that this machine has, got {str(wanted)!r}: {error}"
        ) from error
    return wanted


def _is_same(wanted: torch.device, there: torch.device) -> bool:
    """Whether the device named is the one of the weights; "cuda" is any of several."""
    return wanted.type == there.type and wanted.index in (None, there.index)
