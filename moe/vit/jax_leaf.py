"""One array of an official checkpoint, and the part of a parameter that holds it.

The parameter may be sharded. Then each process reads what it holds.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ironmoe.moe.sharded import local_box, local_values, whole_tensor


class Leaf(NamedTuple):
    """One array of a checkpoint.

    name: of the array; parameter: what holds it; pattern: from the parameter's layout to the
    array's, with the sizes that einops cannot know; rows: those of the parameter that hold the
    array, by default all.
    """

    name: str
    parameter: Tensor
    pattern: str
    sizes: Mapping[str, int] = MappingProxyType({})
    rows: slice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        held = torch.empty(self.parameter.shape, device="meta")
        return tuple(self._to_array(held if self.rows is None else held[self.rows]).shape)

    def to_array(self) -> Tensor:
        """The array. Processes that share the parameter must call it together."""
        whole = whole_tensor(self.parameter)
        return self._to_array(whole if self.rows is None else whole[self.rows])

    def copy_from(self, array: Any) -> None:
        """Set the values that this process holds. Of an array in a file it reads these alone, where
        the two layouts differ by the order of the axes; else the whole array.

        array: of numpy, or a ``StoredArray``.
        """
        held, values = local_box(self.parameter), local_values(self.parameter)
        if not held:
            values.copy_(_tensor(array[...]))
            return

        first, rows = held[0][0], range(self.parameter.shape[0])[self.rows or slice(None)]
        begin, end = max(first, rows.start), min(held[0][1], rows.stop)
        if begin < end and values.numel():
            box = ((begin - rows.start, end - rows.start), *held[1:])
            values[begin - first : end - first].copy_(self._part(array, box))

    def _to_array(self, values: Tensor) -> Tensor:
        return rearrange(values, self.pattern, **self.sizes)

    def _part(self, array: Any, box: tuple[tuple[int, int], ...]) -> Tensor:
        """What lies in a box of the rows, in the parameter's layout."""
        slices = tuple(slice(*axis) for axis in box)
        ours, theirs = (side.strip() for side in self.pattern.split("->"))
        back = f"{theirs} -> {ours}"
        if "(" in ours:
            whole = _tensor(array[...])
            return rearrange(whole, back, **self.sizes)[slices]
        if ours != "...":
            slices = tuple(slices[ours.split().index(axis)] for axis in theirs.split())
        return rearrange(_tensor(array[slices or ...]), back)


def _tensor(array: Any) -> Tensor:
    """The values in float32. What cannot be shared, such as a read-only array, is copied."""
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
