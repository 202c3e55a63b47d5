"""Differences and lengths that a search may begin with where they are 0."""

import torch
from torch import Tensor

# A difference of so many units in the last place of the larger number is rounding.
ROUNDING = 64


def difference(outputs: Tensor, labels: Tensor) -> Tensor:
    """(R, D) outputs minus labels, both (R, D). What is no more than rounding is 0, so that a
    search which begins at its own label does not go where the rounding of its batch points to."""
    apart = outputs - labels
    scale = torch.maximum(outputs.detach().abs().amax(1), labels.abs().amax(1)).unsqueeze(1)
    is_rounding = apart.detach().abs() <= ROUNDING * torch.finfo(apart.dtype).eps * scale
    return torch.where(is_rounding, apart - apart.detach(), apart)


def length(vectors: Tensor) -> Tensor:
    """(R,) of vectors (R, D).

    At 0, where the length has no derivative, this one has the derivative along one direction, one
    of the many that fit. So a search may begin at its least value.
    """
    known = vectors.detach()
    lengths = known.norm(dim=1, keepdim=True)
    places = torch.arange(1, vectors.shape[1] + 1, device=vectors.device)
    anywhere = unit(places.to(vectors.dtype).cos().unsqueeze(0))
    direction = torch.where(lengths > 0, unit(known), anywhere)
    return (vectors * direction).sum(1)


def unit(vectors: Tensor) -> Tensor:
    """(R, D) of length 1; 0 stays 0."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(_least(vectors))


def _least(vectors: Tensor) -> float:
    return torch.finfo(vectors.dtype).tiny
