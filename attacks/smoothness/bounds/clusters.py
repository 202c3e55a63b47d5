"""The experiment of orthogonal clusters: linear experts of clusters against one linear model.

E clusters of data lie in subspaces of their own, which meet at one angle. A mixture with fixed
routing has a linear expert for each cluster, its interpolant of least norm. The dense model is the
linear interpolant of least norm of all data. The Lipschitz constant of a linear model is the norm
of its weights; inside clusters that of the mixture is the largest of its experts.

What holds. The dense model interpolates each cluster, so its norm is at least that of every
expert: the ratio dense / mixture is at least 1 at every angle. Where the subspaces are orthogonal,
the dense model is the sum of the experts, ‖w‖² = Σ ‖w_e‖², and the ratio is at most √E, which it is
where all norms are equal: the paper's case (arXiv 2210.10253). At another angle θ the Gram matrix
of the subspaces has the eigenvalue 1 − cos θ, and no smaller one, so ‖w‖² ≤ Σ ‖w_e‖² / (1 − cos θ):
the ratio is at most √(E / (1 − cos θ)), and may exceed √E.

The jump between clusters, where the mixture changes its expert, is in no number here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.methods.parts.counts import check_counts


class ClusterRow(NamedTuple):
    """One draw of the experiment.

    angle: between the subspaces of any two clusters, in degrees
    experts: E; seed: of the draw
    dense, moe: the two Lipschitz constants
    ratio: dense / moe
    bound: √(E / (1 − cos angle)), which ratio never exceeds; √E at 90 degrees
    """

    angle: float
    experts: int
    seed: int
    dense: float
    moe: float
    ratio: float
    bound: float


def clusters_experiment(
    experts: Sequence[int] = (2, 4, 8, 16),
    angles: Sequence[float] = (90.0, 75.0, 60.0, 45.0, 30.0),
    *,
    seeds: Sequence[int] = tuple(range(8)),
    dim: int = 8,
    points: int = 4,
    equal_norms: bool = True,
) -> list[ClusterRow]:
    """Draw data and targets, compute both models exactly, and compare them.

    Of a cluster the points are normal in its subspace and the targets are normal. Subspaces are
    spanned by cos φ · c + sin φ · b_e for the basis vectors c of a common block and b_e of a block
    of the cluster's own, cos² φ = cos θ; all angles between two of them are then θ. The points of
    all angles are the same but for that.

    Args:
        experts: numbers E of clusters, each at least 1.
        angles: θ in degrees, from 1 to 90.
        seeds: of the draws, each at least 0.
        dim: of a cluster's subspace; the data have dimension (E + 1) · ``dim``.
        points: of a cluster, at most ``dim``: so many can be interpolated whatever the targets.
        equal_norms: scale the targets of each cluster so that all experts have norm 1, the case in
            which the ratio is √E at 90 degrees.

    Returns:
        A row for each number of experts, angle and seed, in this order.

    Raises:
        ValueError: numbers outside the above. TypeError: counts that are no whole numbers.
    """
    check_counts(1, dim=dim, points=points, **{f"experts[{i}]": e for i, e in enumerate(experts)})
    check_counts(0, **{f"seeds[{i}]": seed for i, seed in enumerate(seeds)})
    if points > dim:
        raise ValueError(f"points must be at most dim = {dim}, got {points}")
    for angle in angles:
        if not 1 <= angle <= 90:
            raise ValueError(f"angles must be from 1 to 90 degrees, got {angle}")
    return [
        _row(float(angle), count, seed, dim, points, equal_norms)
        for count in experts
        for angle in angles
        for seed in seeds
    ]


def _row(
    angle: float, experts: int, seed: int, dim: int, points: int, equal_norms: bool
) -> ClusterRow:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    # in coordinates of the subspace, whose basis is orthonormal: norms are the same there
    inside_END, targets_EN = normal(experts, points, dim), normal(experts, points)
    norms_E = _least_norm(inside_END, targets_EN)
    if equal_norms:
        targets_EN = targets_EN / norms_E[:, None]
        norms_E = torch.ones_like(norms_E)

    cosine = 0.0 if angle == 90 else math.cos(math.radians(angle))
    data_END = torch.zeros(experts, points, experts + 1, dim, dtype=torch.float64)
    data_END[:, :, 0] = math.sqrt(cosine) * inside_END
    for number in range(experts):
        data_END[number, :, number + 1] = math.sqrt(1 - cosine) * inside_END[number]

    every_point = data_END.view(experts * points, -1)
    dense = float(_least_norm(every_point, targets_EN.flatten()))
    moe = float(norms_E.max())
    bound = math.sqrt(experts / (1 - cosine))
    return ClusterRow(angle, experts, seed, dense, moe, dense / moe, bound)


def _least_norm(points_ND: Tensor, targets_N: Tensor) -> Tensor:
    """The norm of the shortest w with points · w = targets."""
    solution = torch.linalg.lstsq(points_ND, targets_N[..., None], driver="gelsd").solution
    return solution[..., 0].norm(dim=-1)
