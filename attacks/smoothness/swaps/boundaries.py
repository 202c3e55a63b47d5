"""How many images and tokens are near a change of routing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.smoothness.swaps.nearest import Swaps


class BoundaryProfile(NamedTuple):
    """How many images and tokens have a change of routing within each radius, to first order.

    radii:  (R,) float64
    images: (R,) float64, share of images that have a swap within the radius, of a token that
        matters
    tokens: (R,) float64, share of the real tokens of all layers; 0 if there are none
    layers: name → (R,) float64, share of the real tokens of one layer
    """

    radii: Tensor
    images: Tensor
    tokens: Tensor
    layers: dict[str, Tensor]


def boundary_profile(swaps: Swaps, radii: Sequence[float]) -> BoundaryProfile:
    """How many images and tokens have a swap within each of these radii.

    Args:
        swaps: what ``nearest_swaps`` returned.
        radii: at least 0, in the units of the images and in the norm of ``swaps``.

    Raises:
        ValueError: a radius that is negative or NaN.
    """
    radii_R = torch.as_tensor(radii, dtype=torch.float64, device=swaps.nearest.device)
    if radii_R.ndim != 1 or not bool((radii_R >= 0).all()):
        raise ValueError(f"radii must be a sequence of numbers of at least 0, got {radii}")

    real = {name: layer.distances[layer.real] for name, layer in swaps.layers.items()}
    everything = torch.cat([swaps.nearest[:0], *real.values()])
    return BoundaryProfile(
        radii=radii_R,
        images=_shares(swaps.nearest, radii_R),
        tokens=_shares(everything, radii_R),
        layers={name: _shares(distances, radii_R) for name, distances in real.items()},
    )


def _shares(distances: Tensor, radii_R: Tensor) -> Tensor:
    """(R,) share of the distances (n,) within each radius. One of inf lies within none."""
    within = (distances <= radii_R[:, None]) & distances.isfinite()
    return within.double().sum(1) / max(len(distances), 1)
