"""The auxiliary loss of a router: the weighted losses of each group of tokens, and their mean.

Shape suffixes: T tokens, E experts; G groups, S tokens of a group.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ironmoe.moe.routers.losses import balance_loss, importance_loss, load_loss, router_z_loss


class LossWeights(Protocol):
    """What a router says about its losses."""

    training: bool
    top_k: int
    noise_std: float
    importance_weight: float
    load_weight: float
    balance_weight: float
    z_weight: float


class RoutedTokens(NamedTuple):
    """What the losses see of tokens. The axis of tokens is the last but one; leading axes are
    groups already, as the members of an ensemble are.

    logits, noisy: (…, T, E) without and with the noise of training
    mask:          (…, T) bool, True for a real token, or None
    """

    logits: Tensor
    noisy: Tensor
    mask: Tensor | None

    def groups(self, size: int | None) -> "list[RoutedTokens]":
        """The same tokens as (…, G, S, E), and those of a smaller last group as (…, 1, S, E); none
        where there is no token. ``size``: S, by default all tokens."""
        num_tokens = self.logits.shape[-2]
        size = max(min(size or num_tokens, num_tokens), 1)
        whole = num_tokens // size * size
        parts = [(0, whole, size), (whole, num_tokens, num_tokens - whole)]
        return [self._part(*part) for part in parts if part[1] > part[0]]

    def _part(self, start: int, stop: int, size: int) -> "RoutedTokens":
        axis = self.logits.ndim - 2

        def split(values: Tensor) -> Tensor:
            return values.narrow(axis, start, stop - start).unflatten(axis, (-1, size))

        mask = None if self.mask is None else split(self.mask)
        return RoutedTokens(split(self.logits), split(self.noisy), mask)


def auxiliary_loss(
    router: LossWeights, tokens: RoutedTokens, tokens_per_group: int | None
) -> Tensor:
    """Scalar: the mean over the groups with a real token; 0 where there is none."""
    groups = tokens.groups(tokens_per_group)
    return mean_over_groups(groups, lambda group: _group_losses(router, group), tokens)


def mean_over_groups(
    groups: list[RoutedTokens], loss: Callable[[RoutedTokens], Tensor], tokens: RoutedTokens
) -> Tensor:
    """Scalar. ``loss`` takes groups (…, G, S, E) to one number each, (…, G)."""
    if not groups:
        return tokens.logits.new_zeros(())
    losses = torch.cat([loss(group).flatten() for group in groups])
    if tokens.mask is None:
        return losses.mean()
    masks = [group.mask for group in groups if group.mask is not None]
    counts = torch.cat([mask.any(-1).flatten() for mask in masks])
    return losses.where(counts, 0).sum() / counts.sum().clamp_min(1)


def _group_losses(router: LossWeights, group: RoutedTokens) -> Tensor:
    """(…, G), one loss a group."""
    logits_GSE, noisy_GSE, mask = group
    total_G = logits_GSE.new_zeros(logits_GSE.shape[:-2])
    if router.importance_weight:
        gates_GSE = logits_GSE.softmax(-1)
        total_G = total_G + router.importance_weight * importance_loss(gates_GSE, mask=mask)
    if router.load_weight and router.noise_std > 0 and router.training:
        std = router.noise_std / logits_GSE.shape[-1]
        load_G = load_loss(logits_GSE, noisy_GSE, std, router.top_k, mask=mask)
        total_G = total_G + router.load_weight * load_G
    if router.balance_weight:
        total_G = total_G + router.balance_weight * balance_loss(noisy_GSE.softmax(-1), mask=mask)
    if router.z_weight:
        total_G = total_G + router.z_weight * router_z_loss(logits_GSE, mask=mask)
    return total_G
