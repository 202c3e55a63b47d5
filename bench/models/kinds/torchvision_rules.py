"""torchvision's transforms on Pillow images as rules of ``Preprocessing``."""

from collections.abc import Iterable, Sequence
from typing import Any

from ironmoe.attacks.data.preprocessing import INTERPOLATIONS, Preprocessing
from ironmoe.moe.checkpoints.errors import CheckpointError

TO_TENSOR = {"ToTensor", "PILToTensor", "ToImage", "ConvertImageDtype", "Normalize"}


def rules_of(transforms: Iterable[Any], wanted_by: object, source: str) -> Preprocessing:
    """Resize, then CenterCrop, then ToTensor: any of them may be missing.

    Args:
        transforms: what a ``Compose`` holds.
        wanted_by: how errors begin; source: where this was read, for people.

    Raises:
        CheckpointError: there is another transform, or they come in another order.
    """
    rules = Preprocessing(source=source)
    for each in transforms:
        kind = type(each).__name__
        if kind == "Resize" and rules.crop is None and rules.resize is None and not _limit(each):
            rules = resized(rules, each.size, interpolation_of(each.interpolation, wanted_by))
        elif kind == "CenterCrop" and rules.crop is None:
            rules = rules.with_(crop=_pair(each.size))
        elif kind not in TO_TENSOR:
            raise CheckpointError(
                f"{wanted_by} must have a preprocessing of Resize, CenterCrop and ToTensor, in "
                f"this order, got {each}"
            )
    return rules


def resized(rules: Preprocessing, size: int | Sequence[int], interpolation: str) -> Preprocessing:
    """The rules after ``Resize(size)``: one number is for the shorter edge, two are exact."""
    exact = not isinstance(size, int) and len(size) == 2
    mode = "exact" if exact else "shortest"
    return rules.with_(resize=_pair(size), mode=mode, interpolation=interpolation)


def interpolation_of(mode: Any, wanted_by: object) -> str:
    """The name of an ``InterpolationMode``, or of one of Pillow's numbers.

    Raises:
        CheckpointError: Pillow has no such resampling.
    """
    name = str(getattr(mode, "value", mode))
    name = "nearest" if name == "nearest-exact" else name  # Pillow's nearest is exact
    if name not in INTERPOLATIONS:
        raise CheckpointError(
            f"{wanted_by} must be resized by one of {', '.join(INTERPOLATIONS)}, got {mode}"
        )
    return name


def _limit(resize: Any) -> bool:
    return getattr(resize, "max_size", None) is not None


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
