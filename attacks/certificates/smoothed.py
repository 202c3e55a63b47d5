"""A smoothed model with gradients, for attacks on it (SmoothAdv: Salman et al., arXiv 1906.04584,
section 2.2)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.certificates.arguments import as_count, as_seed, as_sigma
from ironmoe.attacks.certificates.noise import Draw, copy_keys, with_noise
from ironmoe.attacks.certificates.separate import check_separate
from ironmoe.attacks.engine.attacked_model import AttackedModel, Model, Normalize
from ironmoe.attacks.extra import extra_columns
from ironmoe.attacks.model_errors import check_not_labels


class Smoothed(nn.Module):
    """images (B, …) → (B, C), the logarithm of the mean softmax over noisy copies of each image.

    Any attack of the library takes it as its model: the cross-entropy that it raises is the loss of
    SmoothAdv. The noise is made of ``seed`` alone. All images, in every call, get the same
    ``draws`` copies of it, so that an attack climbs one surface, whatever batches its images are
    in. Beside a certificate stands what ``predict`` says of the images that were found:
    ``attack_curve``.

    A pass over B images is one of B · draws rows of the model.

    Args:
        model: takes images, and judges each by itself.
        sigma: standard deviation of the noise, in the units of the images.
        draws: m of the paper.
        seed: of the noise.
        normalize, logits_fn: as for attacks, and to be given here: an attack with ``normalize``
            would have the noise added to normalised images.

    Raises:
        ValueError: a model in which images influence each other; an argument outside the above.
        TypeError: arguments that are no such thing.
    """

    def __init__(
        self,
        model: Model,
        sigma: float,
        *,
        draws: int = 16,
        seed: int = 0,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_separate(model)

        self.model = model
        self.sigma = as_sigma(sigma)
        self.draws = as_count("draws", draws)
        self.seed = as_seed(seed)
        self.called = AttackedModel(model, normalize, logits_fn)

    def forward(self, images: Tensor, *inputs: Tensor, **named: Tensor) -> Tensor:
        """(B, C) in at least float32."""
        count = len(images)
        columns = {**extra_columns(inputs, count), **extra_columns(named, count)}
        repeated = {name: col.repeat_interleave(self.draws, 0) for name, col in columns.items()}

        self.called.image_dtype = images.dtype
        logits = self.called.logits(self._copies(images), repeated)
        check_not_labels(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        of_copies = logits.log_softmax(1).view(count, self.draws, -1)
        return of_copies.logsumexp(1) - math.log(self.draws)

    def _copies(self, images: Tensor) -> Tensor:
        """(B · draws, …) in at least float32, the copies of an image side by side."""
        numbers = torch.arange(self.draws, device=images.device)
        keys = copy_keys(self.seed, numbers, Draw.ATTACK, torch.zeros_like(numbers))
        wide = torch.promote_types(images.dtype, torch.float32)
        noise = with_noise(
            images.new_zeros(self.draws, *images.shape[1:], dtype=wide), self.sigma, keys
        )
        return (images.unsqueeze(1) + noise).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, draws={self.draws}, seed={self.seed}"
