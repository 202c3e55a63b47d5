"""How RobustBench prepares images for a model of its zoo, by RobustBench's own table."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ironmoe.attacks.robustbench.imagenet import PREPARATIONS


def zoo_preprocessing(threat_model: str, model_name: str) -> str | Callable[[Any], Tensor]:
    """A name in ``PREPARATIONS``, or, for a model that RobustBench registers in timm, a function
    from a Pillow image to a tensor (3, H, W).

    Raises:
        ValueError: RobustBench cannot be imported, or has no model of this name for ImageNet.
    """
    wanted = f"preprocessing must be one of {tuple(PREPARATIONS)}, or a function, got None"
    try:
        from robustbench.data import PREPROCESSINGS, get_preprocessing
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    except Exception as error:  # with a torchvision for another torch it fails in many ways
        raise ValueError(
            f"{wanted}: RobustBench's table would say it for {model_name!r}, but robustbench "
            f"cannot be imported ({type(error).__name__}: {error})"
        ) from error

    dataset, threat = BenchmarkDataset("imagenet"), ThreatModel(threat_model)
    try:
        found = get_preprocessing(dataset, threat, model_name, None)
    except Exception as error:  # a KeyError, or a bare one in the release on PyPI
        raise ValueError(
            f"{wanted}: RobustBench has it for the models of its zoo alone, and there is no "
            f"{model_name!r} among those for imagenet and {threat_model}"
        ) from error
    return next((name for name in PREPARATIONS if PREPROCESSINGS.get(name) is found), found)
