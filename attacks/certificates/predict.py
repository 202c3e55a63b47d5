"""What a smoothed model predicts (Cohen, Rosenfeld & Kolter, arXiv 1902.02918, section 3.2,
PREDICT)."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.certificates.arguments import (
    as_alpha,
    as_attack,
    as_count,
    as_seed,
    as_sigma,
)
from ironmoe.attacks.certificates.binomial import coin_p_value
from ironmoe.attacks.certificates.certificate import ABSTAINS
from ironmoe.attacks.certificates.noise import Draw
from ironmoe.attacks.certificates.separate import check_separate, look_at_copies
from ironmoe.attacks.certificates.voting import Tally, Voting, ballots_of, ranked
from ironmoe.attacks.engine.attacked_model import Model, Normalize
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.inputs import Chunk, check_images, prepared
from ironmoe.attacks.extra import Extra

WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def predict(
    model: Model,
    images: Tensor,
    *,
    sigma: float,
    samples: int = 1_000,
    alpha: float = 0.001,
    batch_size: int = 256,
    seed: int = 0,
    indices: Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
    normalize: Normalize | None = None,
    logits_fn: Callable[[Any], Tensor] | None = None,
    extra: Extra | None = None,
) -> Tensor:
    """The classes (N,) int64 that the smoothed model gives to images (N, …); −1 where it abstains.

    The two classes of most votes over ``samples`` noisy copies are compared by a two-sided binomial
    test. A class that is returned is another one than the smoothed model's with a probability of at
    most ``alpha``.

    Args:
        samples: n of the paper.
        indices: (N,) the images' numbers in their data, for their noise; by default 0 … N − 1.
        extra: further inputs of the model, one entry an image.

    The others are those of ``certify``; noise is not that of its votes.

    Raises:
        ValueError, TypeError: as ``certify``.
    """
    sigma = as_sigma(sigma)
    samples = as_count("samples", samples)
    alpha = as_alpha(alpha)
    batch_size = as_count("batch_size", batch_size)
    seed = as_seed(seed)
    check_separate(model)

    attack = as_attack(model, bounds, normalize, logits_fn)
    count = len(images) if isinstance(images, Tensor) else 0
    labels = torch.zeros(count, dtype=torch.int64, device=getattr(images, "device", None))
    check_images(images, labels, bounds, attack.goal)
    if indices is not None:
        _check_indices(indices, count)

    attack.attacked_model.image_dtype = images.dtype
    draws = ((Draw.PREDICTION, samples),)
    voting = Voting(attack.attacked_model, sigma, seed, batch_size, draws)
    chunk = prepared(images, labels, indices, extra=extra)
    if not count:
        return labels
    with borrowed(model):
        look = look_at_copies(voting, chunk)
        if look.refused is not None:
            raise ValueError(look.refused)
        return voted_classes(voting, chunk, alpha)


def _check_indices(indices: Any, count: int) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor ({count},), got {type(indices).__name__}")
    if indices.dtype not in WHOLE_NUMBERS:
        raise TypeError(f"indices must be whole numbers, got a tensor of {indices.dtype}")
    if indices.shape != (count,):
        raise ValueError(f"indices must have shape ({count},), got {tuple(indices.shape)}")


def voted_classes(voting: Voting, chunk: Chunk, alpha: float) -> Tensor:
    """(n,) int64 on the images' device, by a vote of one draw; −1 where two classes are too close
    to each other."""
    tallies = [Tally(number, label=0) for number in chunk.indices.tolist()]
    for _ in voting.run(ballots_of(chunk, tallies)):
        pass
    classes = [_winner(tally.votes[0], alpha) for tally in tallies]
    return torch.tensor(classes, dtype=torch.int64, device=chunk.images.device)


def _winner(votes: Counter[int], alpha: float) -> int:
    (first, count), (_, other) = [*ranked(votes), (ABSTAINS, 0)][:2]
    return ABSTAINS if coin_p_value(count, other) > alpha else first
