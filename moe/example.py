"""A small V-MoE that was trained, and images that it never saw: for examples, first steps and tests
of tools. It reads one file beside this one and needs no package beside torch and numpy."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ironmoe.moe.vit.vit import VMoE

__all__ = ["ARGUMENTS", "trained_example", "trained_model"]

FILE = Path(__file__).with_name("example.npz")
ARGUMENTS: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "channels": 1,
    "num_classes": 10,
    "dim": 32,
    "depth": 4,
    "heads": 4,
    "mlp_dim": 64,
    "moe_layers": (1, 3),
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 32,
}
"""Of ``VMoE``: two of the four blocks have eight experts, of which a token passes two."""


def trained_example(count: int | None = None) -> tuple[VMoE, Tensor, Tensor]:
    """A V-MoE that reads handwritten digits, and digits that it was not trained on.

    It was trained in the ordinary way, without adversarial images, so it is right on clean images
    and falls under attack. It is small, made for examples, and says nothing about larger models.
    ``tests/support/make_trained_example.py`` trained it.

    The digits are the "Optical Recognition of Handwritten Digits" of E. Alpaydin and C. Kaynak (UCI
    Machine Learning Repository, 1998, CC BY 4.0, doi 10.24432/C50P49), as scikit-learn has them: 8
    × 8 pixels with 17 levels of grey. The images are those that ``ironmoe attack --data digits``
    attacks.

    Args:
        count: how many of the images, from the first; None: all.

    Returns:
        (the model in eval mode, images (count, 1, 8, 8) float32 in [0, 1], labels (count,) int64)

    Raises:
        ValueError: there are not as many images.
    """
    arrays = _arrays()
    images = torch.from_numpy(arrays["images"]).float() / 16
    labels = torch.from_numpy(arrays["labels"]).long()
    if count is not None and not 1 <= count <= len(labels):
        raise ValueError(f"count must be from 1 to {len(labels)} or None, got {count}")

    return trained_model(), images[:count], labels[:count]


def trained_model() -> VMoE:
    """The model alone, in eval mode; a new one at each call, with the same weights. By command:
    ``ironmoe attack --model ironmoe.moe.example:trained_model --data digits``."""
    model = VMoE(**ARGUMENTS)
    prefix = "model."
    model.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(array).float()
            for name, array in _arrays().items()
            if name.startswith(prefix)
        }
    )
    # ironmoe attack then knows that it never saw the test split.
    model.trained_on_data = "digits"  # type: ignore[assignment]
    return model.eval()


@cache
def _arrays() -> dict[str, np.ndarray]:
    """The arrays of the file by name: weights as float16, images and labels as uint8."""
    with np.load(FILE) as file:
        return dict(file)
