"""An array in a file, which is read where it is indexed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ironmoe.moe.checkpoints.vmoe_format import Box


class StoredArray:
    """An array in a file. ``array[2:4]`` reads what lies there, ``array[...]`` reads all.

    shape: of the whole array; dtype: that of what is read, in which a bfloat16 is a float32.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: str, read: Callable[[Box, np.ndarray], None]
    ) -> None:
        """``read`` fills an array with the values in a box."""
        self.shape = shape
        self.dtype = np.dtype("float32" if dtype == "bfloat16" else dtype)
        self._read = read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, when it is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        """What lies in slices of step 1, one for each of the first axes; dots may follow them.

        Raises:
            IndexError: another index.
            CheckpointError: what the file holds there is damaged.
        """
        slices = index if isinstance(index, tuple) else (index,)
        if slices and slices[-1] is Ellipsis:
            slices = slices[:-1]
        simple = all(isinstance(one, slice) and one.step in (None, 1) for one in slices)
        if len(slices) > self.ndim or not simple:
            raise IndexError(
                f"index must be at most {self.ndim} slices of step 1, and dots, got {index}"
            )

        every = (*slices, *[slice(None)] * (self.ndim - len(slices)))
        limits = [one.indices(size)[:2] for one, size in zip(every, self.shape, strict=True)]
        box = tuple((start, max(start, stop)) for start, stop in limits)
        values = np.empty([stop - start for start, stop in box], self.dtype)
        if values.size:
            self._read(box, values)
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole array, for numpy."""
        if copy is False:
            raise ValueError("copy must be True or None for an array in a file, got False")
        return self[...].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"StoredArray(shape={self.shape}, dtype={self.dtype})"
