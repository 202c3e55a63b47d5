"""Match the classes of the data to the logits of a model."""

from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.bench.common.data import BUILT_IN, DataError, ImageData
from ironmoe.bench.common.errors import told
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.moe.checkpoints.errors import CheckpointError


class Matched(NamedTuple):
    """The data in the classes of the model.

    labels: as indices of the logits; classes: names by index of the logits; note: how they were
    matched if not by name, else empty.
    """

    labels: Tensor
    classes: list[str]
    note: str = ""


def match_classes(loaded: LoadedModel, data: ImageData) -> Matched:
    """Match the classes of the data to the logits: by name where all names are known, else by
    number.

    Raises:
        CheckpointError: the model cannot take the images, or returns no logits.
        DataError: the images have another shape, or the classes cannot be matched.
    """
    with torch.no_grad():
        device = next(loaded.model.parameters(), torch.zeros(0)).device
        logits = _logits(loaded, data, device)

    count = logits.shape[1]
    if loaded.classes is not None:
        index = {name.lower(): i for i, name in enumerate(loaded.classes)}
        wanted = [index.get(name.lower()) for name in data.classes]
        if None not in wanted:
            return Matched(torch.tensor(wanted)[data.labels], loaded.classes)

    if len(data.classes) != count:
        raise DataError(
            f"data {data.name!r} must have the {count} classes of {loaded.name}, or names of some "
            f"of them, got {len(data.classes)}: "
            f"{', '.join(data.classes[:5])}"
        )

    unknown = (
        "gives no names of classes"
        if loaded.classes is None
        else f"calls its classes otherwise ({_few(loaded.classes)})"
    )
    pairs = _few([f"logit {number} is {name!r}" for number, name in enumerate(data.classes)])
    return Matched(
        data.labels,
        data.classes,
        f"{loaded.name} {unknown}, so they were matched by number: {pairs}.",
    )


def _few(names: list[str]) -> str:
    """The names, or of many the first three and the last."""
    return ", ".join(names if len(names) <= 5 else [*names[:3], "…", names[-1]])


def _logits(loaded: LoadedModel, data: ImageData, device: torch.device) -> Tensor:
    """The logits of the first image."""
    images = data.images[:1].to(device)
    shape = tuple(images.shape[1:])
    if loaded.image_shape is not None and shape != loaded.image_shape:
        raise DataError(
            f"data must have images of shape {loaded.image_shape} for {loaded.name}, got {shape}; "
            f"{other_data(loaded, data)}"
        )

    try:
        logits = loaded.model(images)
    except Exception as error:  # whatever a model of somebody else's may raise
        raise CheckpointError(
            f"{loaded.source} cannot take images of shape {shape} in [0, 1]: {told(error)}"
        ) from error

    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = (
            f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        )
        raise CheckpointError(f"{loaded.source} must return logits (images, classes), got {got}")

    return logits


def other_data(loaded: LoadedModel, data: ImageData) -> str:
    """A hint about which data to use instead of data that do not fit."""
    known = loaded.facts.get("trained_on_data")
    if known is None or known == data.name:
        return "see --image-size"
    return f"it was trained on {known!r}" + (f": use --data {known}" if known in BUILT_IN else "")
