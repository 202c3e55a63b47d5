"""Position embeddings at another resolution."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def resize_positions(positions: Tensor, side: int, has_token: bool) -> Tensor:
    """(1, n² (+ 1), D) → (1, side² (+ 1), D): linear over the square grid, corner on corner; the
    class token's stays first.

    The same as scipy.ndimage.zoom(order=1), which the official code uses.
    """
    token, grid = positions[:, : int(has_token)], positions[:, int(has_token) :]
    old_side = math.isqrt(grid.shape[1])
    if old_side**2 != grid.shape[1]:
        raise ValueError(
            f"positions must cover a square grid{' and a token' if has_token else ''}, got "
            f"{positions.shape[1]}"
        )
    if old_side == side:
        return positions.clone()
    image = rearrange(grid, "one (h w) d -> one d h w", h=old_side)
    resized = nn.functional.interpolate(image, (side, side), mode="bilinear", align_corners=True)
    return torch.cat([token, rearrange(resized, "one d h w -> one (h w) d")], dim=1)
