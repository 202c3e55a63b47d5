"""The rows of images.csv as arrays: images.npz.

What an image has whatever the attack is one array (N,) under the name of the column. What belongs
to an attack is one array (N,) for each attack, under ATTACK/COLUMN. docs/results.md says what each
column means, and its dtype.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ironmoe.attacks.results.image_rows import KINDS
from ironmoe.attacks.results.rows_file import Row

OF_IMAGES = (
    "number",
    "row",
    "image",
    "label",
    "clean_prediction",
    "clean_right",
    "clean_figure",
    "skipped",
    "passes",
    "checksum",
)
# Names that earlier versions gave to the same arrays.
EARLIER = {"index": "number", "clean_correct": "clean_right"}
# What stands for a value that does not apply.
MISSING: dict[type, Any] = {int: -1, float: float("nan"), str: "", bool: False}


def arrays_file(rows: Sequence[Row]) -> bytes:
    """The content of an .npz file with ``image_arrays``."""
    file = io.BytesIO()
    np.savez(file, **image_arrays(rows))  # type: ignore[arg-type]
    return file.getvalue()


def image_arrays(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    """Name → array, from the rows of all attacks on the same images in the same order.

    A value that is None in its row is −1, NaN, an empty text or False. A column of lists becomes
    (N, L) int64, and (N, 0) where no row has a list.
    """
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    arrays = {}
    for attack in attacks:
        mine = [row for row in rows if row["attack"] == attack]
        for name in mine[0]:
            if name != "attack":
                key = name if name in OF_IMAGES else f"{attack}/{name}"
                arrays[key] = _array([row[name] for row in mine], KINDS.get(name, str))
    return arrays | {earlier: arrays[name] for earlier, name in EARLIER.items() if name in arrays}


def _array(values: Sequence[Any], kind: type) -> NDArray[Any]:
    if kind is list:
        length = max((len(value) for value in values if value is not None), default=0)
        lists = [[-1] * length if value is None else value for value in values]
        return np.array(lists, dtype=np.int64).reshape(len(values), length)
    known = [MISSING[kind] if value is None else value for value in values]
    return np.array(known, dtype={int: np.int64, float: np.float64}.get(kind, kind))
