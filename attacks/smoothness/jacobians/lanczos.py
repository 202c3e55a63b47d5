"""The largest singular value of matrices of which only products are known.

Golub and Kahan's bidiagonalisation (1965), in the form of Paige and Saunders' LSQR (1982), of a
batch of matrices at once. After k steps A V = U B, where B is (k + 1) × k with two diagonals, and
Aᵀ U = V Bᵀ + α v eᵀ, where the last term is all that is missing. So a singular triple of B is one
of A up to α |p|, p the last component of the left vector: there is a singular value of A that near.

Shape suffixes: B matrices, M rows, N columns, K steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class LargestSingularValue(NamedTuple):
    """value: (B,) float64, never above the largest singular value but for rounding
    residual: (B,) float64, a singular value lies within this distance of ``value``
    """

    value: Tensor
    residual: Tensor


def largest_singular_value(
    times: Product,
    transposed: Product,
    start_BM: Tensor,
    size: int,
    *,
    steps: int,
    tolerance: float,
) -> LargestSingularValue:
    """By Lanczos steps with full orthogonalisation, until every residual is at most ``tolerance``
    times its value, or no step is left. Each step costs one product with A and one with Aᵀ.

    Args:
        times: (B, N) → (B, M); transposed: (B, M) → (B, N); both float64.
        start_BM: where the left vectors begin; at random, because one that is orthogonal to the
            singular vector would not see it.
        size: N.
        steps: at least 1.
    """
    rows = start_BM.shape[1]
    left = [start_BM / start_BM.norm(dim=1, keepdim=True)]
    right: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []

    alpha, vector = _next(transposed(left[0]), right, size)
    found: LargestSingularValue | None = None
    while True:
        alphas.append(alpha)
        right.append(vector)
        beta, vector = _next(times(right[-1]) - alpha[:, None] * left[-1], left, rows)
        betas.append(beta)
        left.append(vector)

        alpha, vector = _next(transposed(left[-1]) - beta[:, None] * right[-1], right, size)
        now = _of_bidiagonal(torch.stack(alphas, 1), torch.stack(betas, 1), alpha)
        if found is not None:  # a value that is good enough does not depend on its batch any more
            kept = found.residual <= tolerance * found.value
            both = zip(found, now, strict=True)
            now = LargestSingularValue(*(torch.where(kept, old, new) for old, new in both))
        found = now
        done = bool((found.residual <= tolerance * found.value).all())
        if done or len(right) == min(steps, rows, size):
            return found


def _next(vector: Tensor, others: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """(length (B,), direction (B, size)) of what of the vector is orthogonal to the others; both 0
    where nothing is, as when the others span the space."""
    if len(others) >= size:
        return torch.zeros_like(vector[:, 0]), torch.zeros_like(vector)
    if others:
        basis = torch.stack(others, 2)
        for _ in range(2):  # once leaves rounding errors of the size of what it took away
            vector = vector - (basis @ (basis.mT @ vector[..., None]))[..., 0]

    length = vector.norm(dim=1)
    return length, torch.where(length[:, None] > 0, vector / length[:, None], 0)


def _of_bidiagonal(alphas_BK: Tensor, betas_BK: Tensor, missing_B: Tensor) -> LargestSingularValue:
    """Of B with the diagonal ``alphas`` and ``betas`` below it."""
    steps = alphas_BK.shape[1]
    matrix = alphas_BK.new_zeros(len(alphas_BK), steps + 1, steps)
    diagonal = torch.arange(steps, device=matrix.device)
    matrix[:, diagonal, diagonal] = alphas_BK
    matrix[:, diagonal + 1, diagonal] = betas_BK
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return LargestSingularValue(values[:, 0], missing_B * left[:, -1, 0].abs())
