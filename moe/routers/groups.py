"""Groups of tokens that are routed together."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

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
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.images_per_group = images_per_group
        self.tokens_per_group = tokens_per_group

    def tokens_in_group(self, shape: Sequence[int]) -> int:
        """S for tokens of this shape (…, N, D), of which the axis before the last counts the tokens
        of an image."""
        if self.images_per_group is None:
            return self.tokens_per_group or max(math.prod(shape[:-1]), 1)
        if len(shape) < 3:
            raise ValueError(
                f"x must have shape (images, tokens, {shape[-1]}) for images_per_group, got "
                f"{tuple(shape)}"
            )
        return max(self.images_per_group * shape[-2], 1)

    def in_groups(self, values: Tensor, size: int) -> Tensor:
        """(T, …) → (G, S, …), with 0 where the last group has less than ``size`` tokens.

        An exported program takes any T, so there nothing may ask whether the last group is full.
        """
        if exporting() and self.images_per_group is None and self.tokens_per_group is None:
            return values[None]
        size = size if exporting() else max(min(size, values.shape[0]), 1)
        missing = -values.shape[0] % size
        filled = nn.functional.pad(values, (0, 0) * (values.ndim - 1) + (0, missing))
        return filled.unflatten(0, (-1, size))

    def extra_repr(self) -> str:
        if self.images_per_group is not None:
            return f"images_per_group={self.images_per_group}"
        return f"tokens_per_group={self.tokens_per_group}" if self.tokens_per_group else "one group"
