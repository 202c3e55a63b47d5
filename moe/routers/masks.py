"""Token masks: which rows are tokens, and which are padding.

A masked tensor keeps its shape, so no shape depends on values. What padding holds is replaced
before anything is computed from it: later, NaN in it would have reached a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.sums import sum_over_ranks


def checked_mask(mask: Tensor, shape: Sequence[int], name: str = "mask") -> Tensor:
    """The mask as bool, True for a token.

    Args:
        mask: bool, or integers where 0 marks padding, as Hugging Face's attention_mask.
        shape: what its shape must be.

    Raises:
        TypeError: the mask is no tensor.
        ValueError: its dtype or its shape is another.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"{name} must be bool, or integers where 0 marks padding, got {mask.dtype}"
        )
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def checked_mask_of(values_TX: Tensor, mask: Tensor | None) -> Tensor | None:
    """``checked_mask`` for values (…, T, X); None stays None."""
    return None if mask is None else checked_mask(mask, values_TX.shape[:-1])


def without_masked(routing: Routing, mask_T: Tensor, num_experts: int) -> Routing:
    """The routing with every choice of the masked tokens dropped: expert E, gate 0."""
    is_padding_T1 = ~mask_T[:, None]
    return Routing(
        routing.gates.masked_fill(is_padding_T1, 0),
        routing.experts.masked_fill(is_padding_T1, num_experts),
    )


def zero_padding(values_TX: Tensor, mask_T: Tensor) -> Tensor:
    """(…, T, X) with 0 in place of whatever padding holds, NaN included."""
    return values_TX.masked_fill(~mask_T[..., None], 0)


def for_softmax(mask_BN: Tensor) -> Tensor:
    """The mask of what a softmax over N runs over: all True for an image without a token, because
    the softmax over nothing is NaN. What comes of such an image must be cleared, or must not depend
    on what its padding holds."""
    return mask_BN | ~mask_BN.any(-1, keepdim=True)


def mean_over_tokens(
    values_TX: Tensor, mask_T: Tensor | None, ranks: Group | None = None
) -> Tensor:
    """(…, T, X) → (…, X), the mean over the tokens of the mask, with ``ranks`` over those of all
    these ranks; 0 where there is none."""
    if mask_T is None and ranks is None:
        return values_TX.mean(-2)
    total_X, count_1 = sum_over_tokens(values_TX, mask_T, ranks)
    return total_X / count_1.clamp_min(1)


def sum_over_tokens(
    values_TX: Tensor, mask_T: Tensor | None, ranks: Group | None = None
) -> tuple[Tensor, Tensor]:
    """(…, T, X) → (the sum over the tokens of the mask (…, X), how many these are (…, 1)), with
    ``ranks`` on all these ranks together."""
    if mask_T is not None:
        values_TX = zero_padding(values_TX, mask_T)
    count_1 = number_of_tokens(values_TX, mask_T)
    total_X = values_TX.sum(-2)
    if ranks is None:
        return total_X, count_1

    # one exchange for both, in a dtype that holds the count
    wide = torch.promote_types(total_X.dtype, torch.float32)
    together = sum_over_ranks(torch.cat([total_X.to(wide), count_1.to(wide)], dim=-1), ranks)
    return together[..., :-1].to(total_X.dtype), together[..., -1:].detach().long()


def number_of_tokens(values_TX: Tensor, mask_T: Tensor | None) -> Tensor:
    """(…, 1) int64, how many of the tokens (…, T, X) are real."""
    if mask_T is not None:
        return mask_T.sum(-1, keepdim=True)
    shape = (*values_TX.shape[:-2], 1)
    return values_TX.new_full(shape, values_TX.shape[-2], dtype=torch.int64)
