"""How every picture of a report looks, and how it is written."""

import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ironmoe.bench.reports.ticks import thin_out

COLORS = ("#0b6e99", "#d9622b", "#3f7d3a", "#8a4fa3")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a class may be called $
}
WITHOUT_GRID = {**STYLE, "axes.grid": False}


def save_picture(figure: Figure, file: Path) -> None:
    """Write a PNG and free the figure's memory.

    Numbers beside an axis that would stand on each other are left out. A character that the font
    lacks becomes a box, without a warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        thin_out(figure)
        figure.set_layout_engine("none")  # it is laid out, which takes as long as to draw it
        figure.savefig(file, dpi=130)
    plt.close(figure)
