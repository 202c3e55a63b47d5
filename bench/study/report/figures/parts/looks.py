"""How an arm looks in a figure, so that it can be told apart without colours, too."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from ironmoe.bench.reports.style import COLORS
from ironmoe.bench.study.ladder.arms import Arm

Color = str | tuple[float, float, float, float]
BLACK = "#1c2329"
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
LARGEST, SMALLEST = 10.0, 4.0  # marks, in points


class Look(NamedTuple):
    """size: of the hollow marks, in points; width: of the thick line."""

    label: str
    color: Color
    marker: str
    size: float
    dashes: str | tuple[int, tuple[int, ...]]
    width: float


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """Arm → look, for arms that are drawn in this order. What comes later is smaller and thinner,
    and marks are hollow, so that lines of equal numbers show one inside the other. Dense is black;
    the more experts, the lighter."""
    sizes = np.linspace(LARGEST, SMALLEST, max(2, len(arms))).tolist()
    widths = np.linspace(2.8, 1.2, max(2, len(arms))).tolist()
    colors = _colors(arms)
    return {
        arm.name: Look(
            arm.name,
            BLACK if arm.is_dense else colors[arm.name],
            "X" if arm.is_dense else MARKERS[place % len(MARKERS)],
            sizes[place],
            (0, (1, 1)) if arm.is_dense else DASHES[place % len(DASHES)],
            widths[place],
        )
        for place, arm in enumerate(arms)
    }


def shades(arms: Sequence[Arm]) -> dict[int, Color]:
    """E → colour, the lighter the more experts."""
    counts = sorted({arm.experts for arm in arms if not arm.is_dense})
    found = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, max(2, len(counts))))
    return dict(zip(counts, map(tuple, found.tolist()), strict=False))


def _colors(arms: Sequence[Arm]) -> dict[str, Color]:
    """By the number of experts, where it tells the arms apart."""
    with_experts = [arm for arm in arms if not arm.is_dense]
    by_count = shades(with_experts)
    if len(by_count) < len(with_experts):
        return {arm.name: COLORS[i % len(COLORS)] for i, arm in enumerate(with_experts)}
    return {arm.name: by_count[arm.experts] for arm in with_experts}
