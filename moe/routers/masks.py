"""Token masks: which rows are tokens, and which are padding.

A masked tensor keeps its shape, so no shape depends on values. What padding holds is replaced
before anything is computed from it: later, NaN in it would have reached a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ironmoe.kernels import Routing


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


def mean_over_tokens(values_TX: Tensor, mask_T: Tensor | None) -> Tensor:
    """(…, T, X) → (…, X), the mean over the tokens of the mask; 0 where there is none."""
    if mask_T is None:
        return values_TX.mean(-2)
    count_1 = mask_T.sum(-1, keepdim=True).clamp_min(1)
    return zero_padding(values_TX, mask_T).sum(-2) / count_1
