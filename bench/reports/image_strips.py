"""Rows of images: clean, perturbation, adversarial."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ironmoe.bench.reports.style import COLORS, WITHOUT_GRID


def image_strip(examples: dict[str, Tensor], classes: list[str]) -> Figure:
    """Draw a column for each image: clean image, perturbation, adversarial image; the predictions
    stand above.

    A perturbation is scaled to its largest entry; grey is none.
    """
    count = len(examples["label"])
    with plt.rc_context(WITHOUT_GRID):
        figure, axes = plt.subplots(3, count, figsize=(1.5 * count + 0.6, 5), squeeze=False)
        for column in range(count):
            clean, adversarial = examples["clean"][column], examples["adversarial"][column]
            delta = adversarial - clean
            scale = 2 * delta.abs().max().clamp_min(1e-12)
            label, prediction = int(examples["label"][column]), int(examples["prediction"][column])
            for row, image in enumerate((clean, 0.5 + delta / scale, adversarial)):
                axes[row, column].imshow(
                    _for_imshow(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
                axes[row, column].set(xticks=[], yticks=[])
                axes[row, column].spines[:].set_visible(False)
            axes[0, column].set_title(_short(classes[label]), fontsize=9)
            color = COLORS[1] if label != prediction else "black"
            axes[2, column].set_title(f"→ {_short(classes[prediction])}", fontsize=9, color=color)
        for row, name in enumerate(("clean", "perturbation", "adversarial")):
            axes[row, 0].set_ylabel(name)

    return figure


def _for_imshow(image: Tensor) -> np.ndarray:
    array = image.float().clamp(0, 1).numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
