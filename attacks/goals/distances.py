"""A Euclidean length that has a slope everywhere."""

import torch
from torch import Tensor


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
