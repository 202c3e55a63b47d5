"""Groups of tokens that are routed together."""

import math
from collections.abc import Sequence

from torch import nn


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

    def extra_repr(self) -> str:
        if self.images_per_group is not None:
            return f"images_per_group={self.images_per_group}"
        return f"tokens_per_group={self.tokens_per_group}" if self.tokens_per_group else "one group"
