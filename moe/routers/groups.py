"""Groups of tokens that are routed together."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ironmoe.kernels.checks import check_counts
from ironmoe.kernels.route import exporting


class Grouped(nn.Module):
    """A module that works on each group of tokens by itself: ``images_per_group`` images, or
    ``tokens_per_group`` tokens in a row, or (neither given) the whole batch. Where the batch is no
    multiple, the last group is smaller.
    """

    def __init__(
        self, images_per_group: int | None = None, tokens_per_group: int | None = None
    ) -> None:
        super().__init__()
        if images_per_group is not None and tokens_per_group is not None:
            raise ValueError(
                f"give images_per_group or tokens_per_group, not both, got {images_per_group} and "
                f"{tokens_per_group}"
            )
        sizes = {"images_per_group": images_per_group, "tokens_per_group": tokens_per_group}
        for name, value in sizes.items():
            if value is not None:
                check_counts(**{name: value})
        self.images_per_group = images_per_group
        self.tokens_per_group = tokens_per_group

    def tokens_in_group(self, shape: Sequence[int]) -> int:
        """S for tokens of this shape (…, D), which must be (images, N, D) for
        ``images_per_group``."""
        if self.images_per_group is None:
            return self.tokens_per_group or max(math.prod(shape[:-1]), 1)
        if len(shape) != 3:  # with more axes, as of Swin's tokens, the image might be any of them
            raise ValueError(
                f"x must have shape (images, tokens, {shape[-1]}) for images_per_group, got "
                f"{tuple(shape)}"
            )
        return max(self.images_per_group * shape[-2], 1)

    def in_groups(self, values: Tensor, size: int) -> Tensor:
        """(T, …) → (G, S, …), with 0 where a group has less than ``size`` tokens."""
        num_tokens = values.shape[0]
        if not exporting():
            size = max(min(size, num_tokens), 1)
            missing = -num_tokens % size
            filled = nn.functional.pad(values, (0, 0) * (values.ndim - 1) + (0, missing))
            return filled.unflatten(0, (-1, size))

        # An exported program takes any T: nothing may ask whether the last group is full, nor, as
        # torch does of every size, whether there is one group. So there are always two or more.
        if self._one_group:
            return values[None]
        empty = values.new_zeros(num_tokens // size + 2, size, *values.shape[1:])
        return empty.index_put(_places(num_tokens, size, values), values)

    def out_of_groups(self, values: Tensor, num_tokens: int) -> Tensor:
        """(G, S, …) → (T, …), without what ``in_groups`` filled in."""
        if not exporting():
            return values.flatten(0, 1)[:num_tokens]
        if self._one_group:
            return values[0]
        return values[_places(num_tokens, values.shape[1], values)]

    @property
    def _one_group(self) -> bool:
        return self.images_per_group is None and self.tokens_per_group is None

    def extra_repr(self) -> str:
        if self.images_per_group is not None:
            return f"images_per_group={self.images_per_group}"
        return f"tokens_per_group={self.tokens_per_group}" if self.tokens_per_group else "one group"


def _places(num_tokens: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) the group of each token, and its place there."""
    number_T = torch.arange(num_tokens, device=like.device)
    group_T = number_T // size
    return group_T, number_T - group_T * size


def images_in_group(model: nn.Module) -> int | None:
    """How many neighbouring images influence each other: the least common multiple of the groups of
    all layers; 1 where there is no group. None where a layer's group is the batch, or is a number
    of tokens that need not be whole images."""
    sizes = [each.images_per_group for each in model.modules() if isinstance(each, Grouped)]
    if None in sizes:
        return None
    return math.lcm(*(size for size in sizes if size is not None))
