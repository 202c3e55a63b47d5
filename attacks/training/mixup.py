"""Mixup (Zhang et al., arXiv 1710.09412), as the official V-MoE code mixes: each image with the
next ones of its batch."""

import torch
from torch import Tensor

from ironmoe.attacks.goals.goal import described
from ironmoe.attacks.goals.labels import label_advice
from ironmoe.attacks.training.checks import check_count, check_positive


class Mixup:
    """Weighted means of ``size`` images and of their labels.

    Args:
        concentration: of the Dirichlet distribution from which the weights are drawn; small numbers
            give weights near 0 and 1.
        size: how many images are mixed. The largest weight is that of the image itself.
        each: draw weights for every image; False: the same ones for the batch.
    """

    def __init__(self, concentration: float, *, size: int = 2, each: bool = False) -> None:
        check_positive(concentration=concentration)
        check_count(size=size, at_least=2)
        self.concentration = float(concentration)
        self.size = size
        self.each = each

    def __call__(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Images (B, …) and labels, (B,) int64 or (B, C) probabilities → mixed images (B, …) and
        probabilities (B, C), C = ``classes``. Random numbers come from torch's generator.

        TypeError: labels of another dtype.
        """
        if not labels.is_floating_point():
            if labels.dtype != torch.int64:
                raise TypeError(
                    "labels must be int64 classes (B,) or probabilities (B, C), got "
                    f"{described(labels)}{label_advice(labels, len(images))}"
                )
            labels = torch.nn.functional.one_hot(labels, classes)
        rows = len(images) if self.each else 1
        parameters = torch.full((rows, self.size), self.concentration, device=images.device)
        drawn = torch.distributions.Dirichlet(parameters, validate_args=False).sample()
        weights = drawn.sort(dim=1, descending=True).values

        mixed_labels = _mixed(labels.to(torch.float32), weights)
        # Rounding may lead out of the range of the pixels.
        mixed = _mixed(images, weights).clamp(images.amin(), images.amax())
        return mixed, mixed_labels

    def __repr__(self) -> str:
        return f"Mixup({self.concentration:g}, size={self.size}, each={self.each})"


def _mixed(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each row and the next ones, in circles; weights (B or 1, size)."""
    parts = []
    for i, weight in enumerate(weights.to(values.dtype).unbind(1)):
        shaped = weight.view(-1, *(1,) * (values.ndim - 1))
        parts.append(shaped * values.roll(-i, 0))
    return torch.stack(parts).sum(0)
