"""Rows of images: clean, difference, adversarial."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ironmoe.bench.common.radii import to_255
from ironmoe.bench.reports.style import COLORS, WITHOUT_GRID

LONGEST = 14  # characters of a name above a picture


def image_strip(
    examples: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    above: Sequence[str],
    below: Sequence[str],
) -> Figure:
    """Draw a column for each image: the clean image with its class, the difference with its scale,
    the adversarial image with the prediction.

    A difference is scaled to its largest entry; grey is none.

    Args:
        examples: "clean" and "adversarial" (n, C, S, S) in [0, 1], "label" and "prediction" (n,)
            int64.
        classes: names of the classes by label.
        above, below: a text for each image, over and under its column.
    """
    count = len(examples["label"])
    with plt.rc_context(WITHOUT_GRID):
        figure, axes = plt.subplots(3, count, figsize=(1.5 * count + 0.6, 5.8), squeeze=False)
        for column in range(count):
            clean, adversarial = examples["clean"][column], examples["adversarial"][column]
            label, prediction = int(examples["label"][column]), int(examples["prediction"][column])
            largest = _largest(clean, adversarial)
            difference = 0.5 + (adversarial - clean) / (2 * max(largest, 1e-12))

            for row, image in enumerate((clean, difference, adversarial)):
                axes[row, column].imshow(
                    _for_imshow(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
                axes[row, column].set(xticks=[], yticks=[])
                axes[row, column].spines[:].set_visible(False)

            axes[0, column].set_title(f"{above[column]}\n{_short(classes[label])}", fontsize=9)
            axes[1, column].set_xlabel(f"± {to_255(largest):.3g}/255", fontsize=8)
            color = COLORS[1] if label != prediction else "black"
            axes[2, column].set_title(f"→ {_short(classes[prediction])}", fontsize=9, color=color)
            axes[2, column].set_xlabel(below[column], fontsize=8)
        for row, name in enumerate(("clean", "difference", "adversarial")):
            axes[row, 0].set_ylabel(name)

    return figure


def strip_in_words(
    examples: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    above: Sequence[str],
    below: Sequence[str],
) -> str:
    """What the strip shows, image by image."""
    parts = []
    for i, (name, fate) in enumerate(zip(above, below, strict=True)):
        label, prediction = int(examples["label"][i]), int(examples["prediction"][i])
        answer = "still right" if label == prediction else f"taken for {classes[prediction]}"
        largest = to_255(_largest(examples["clean"][i], examples["adversarial"][i]))
        parts.append(
            f"{name} of class {classes[label]}, {answer}, {' '.join(fate.split())}, no pixel "
            f"changed by more than {largest:.3g}/255"
        )
    return f"{'; '.join(parts)}."


def _largest(clean: Tensor, adversarial: Tensor) -> float:
    return float((adversarial - clean).abs().max())


def _for_imshow(image: Tensor) -> np.ndarray:
    array = image.float().clamp(0, 1).numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
