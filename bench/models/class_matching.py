"""Match the classes of the data to the logits of a model that was loaded."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ironmoe.attacks.data import DataError
from ironmoe.attacks.data.classes import Matched, match_classes
from ironmoe.bench.common.errors import told
from ironmoe.bench.data.built_in import BUILT_IN
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.moe.checkpoints.errors import CheckpointError

CLASS_MAP = "--class-map FILE"
RGB = 3


def match_data(loaded: LoadedModel, data: ImageData) -> tuple[ImageData, str]:
    """(the data with labels that are indices of the logits and with names of all of them, what
    there is to say of how they were matched).

    Raises:
        CheckpointError, DataError: see ``match``.
    """
    names = data.classes if data.named else None
    matched = match(loaded, data.images[:1], names, data.labels, data=data.name)
    labels = data.labels if matched.logits is None else matched.logits[data.labels]
    return (
        ImageData(
            name=data.name,
            images=data.images,
            labels=labels,
            classes=matched.names,
            skipped=data.skipped,
            notes=data.notes,
        ),
        matched.note,
    )


def match(
    loaded: LoadedModel,
    image: Tensor,
    names: Sequence[str] | None,
    labels: Tensor | None,
    *,
    data: str,
    class_map: Mapping[str, int | str] | None = None,
) -> Matched:
    """Find the logit of each class.

    Args:
        image: (1, C, H, W), one of the images in [0, 1].
        names: of the classes, by label; None: labels are indices.
        labels: (N,) those of the data; None: they are not known yet.
        data: its name.
        class_map: what the user says of classes.

    Raises:
        CheckpointError: the model cannot take the image, or returns no logits.
        DataError: the image has another shape than the model takes, or a class has no logit.
    """
    with torch.no_grad():
        logits = _logits(loaded, image, data)
    try:
        return match_classes(
            names,
            labels,
            logits.shape[1],
            model_names=loaded.classes,
            class_map=class_map,
            model=loaded.name,
        )
    except DataError as error:
        text = str(error).replace("give a class map", f"give {CLASS_MAP}")
        raise DataError(f"data {data!r}: {text}") from error


def _logits(loaded: LoadedModel, image: Tensor, data: str) -> Tensor:
    """The logits of one image."""
    device = next(loaded.model.parameters(), torch.zeros(0)).device
    shape = tuple(image.shape[1:])
    if loaded.image_shape is not None and shape != loaded.image_shape:
        raise DataError(
            f"data must have images of shape {loaded.image_shape} for {loaded.name}, got {shape}; "
            f"{other_data(loaded, data)}{loaded.for_size(*shape[1:])}"
        )

    try:
        logits = loaded.model(image.to(device))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model of somebody else's may raise
        raise CheckpointError(
            f"{loaded.source} cannot take images of shape {shape} in [0, 1]: {told(error)}"
            f"{_channels_of(loaded, image.to(device))}"
        ) from error

    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = (
            f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        )
        raise CheckpointError(f"{loaded.source} must return logits (images, classes), got {got}")

    return logits


def _channels_of(loaded: LoadedModel, image: Tensor) -> str:
    """What to do where the model takes the image with another number of channels; nothing where it
    does not."""
    grey = image.mean(1, keepdim=True)
    other = grey if image.shape[1] > 1 else grey.expand(-1, RGB, -1, -1)
    try:
        loaded.model(other)
    except Exception:  # so it is not the channels
        return ""
    takes, has = (f"{n} channel{'s' * (n > 1)}" for n in (other.shape[1], image.shape[1]))
    return (
        f". The model takes {takes}, and the images have {has}: the model of a function says so by "
        f"its attribute preprocessing = Preprocessing(channels={other.shape[1]}, …), see "
        "docs/models.md"
    )


def other_data(loaded: LoadedModel, data: str) -> str:
    """A hint about which data to use instead of data that do not fit."""
    known = loaded.facts.get("trained_on_data")
    if known is None or known == data:
        return "see --image-size"
    return f"it was trained on {known!r}" + (f": use --data {known}" if known in BUILT_IN else "")
