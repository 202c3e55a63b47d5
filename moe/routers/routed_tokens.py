"""Tokens as the losses of a router see them, in groups.

Shape suffixes: T tokens, E experts, K choices; G groups, S tokens of a group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels.scores import get_score
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.sums import sum_over_ranks
from ironmoe.moe.routers.masks import number_of_tokens


class RoutedTokens(NamedTuple):
    """The axis of tokens is the last but one, of the mask the last. Leading axes are groups
    already, as the members of an ensemble are.

    logits, noisy: (…, T, E) without and with the noise of training
    experts:       (…, T, K) int, the choices of the router; E and more stands for a dropped one
    mask:          (…, T) bool, True for a real token, or None
    score:         a name in ``ironmoe.kernels.scores.SCORES``
    ranks:         the ranks whose tokens have a loss together with these, or None
    """

    logits: Tensor
    noisy: Tensor
    experts: Tensor
    mask: Tensor | None
    score: str
    ranks: Group | None = None

    @property
    def scores(self) -> Tensor:
        """(…, T, E), what the router compared, without a selection bias."""
        return get_score(self.score).value(self.noisy)

    def groups(self, size: int | None) -> "list[RoutedTokens]":
        """The same tokens as (…, G, S, E), and those of a smaller last group as (…, 1, S, E); none
        where there is no token. ``size``: S, by default all tokens. Such groups are of this rank
        alone."""
        num_tokens = self.logits.shape[-2]
        size = max(min(size or num_tokens, num_tokens), 1)
        whole = num_tokens // size * size
        parts = [(0, whole, size), (whole, num_tokens, num_tokens - whole)]
        return [self._part(*part) for part in parts if part[1] > part[0]]

    def mean_over_groups(
        self, size: int | None, loss: "Callable[[RoutedTokens], Tensor]"
    ) -> Tensor:
        """Scalar: the mean over the groups with a real token; 0 where there is none. ``loss`` takes
        groups (…, G, S, E) to one number each, (…, G).

        With ``ranks`` all tokens of all ranks are one group; groups of a size do not span ranks,
        and the mean is that over the groups of all ranks.
        """
        if self.ranks is not None:
            return self._mean_over_ranks(size, loss, self.ranks)
        groups = self.groups(size)
        if not groups:
            return self.logits.sum()  # 0, with a gradient
        losses = torch.cat([loss(group).flatten() for group in groups])
        masks = [group.mask.any(-1).flatten() for group in groups if group.mask is not None]
        if not masks:
            return losses.mean()
        is_real = torch.cat(masks)
        return losses.where(is_real, 0).sum() / is_real.sum().clamp_min(1)

    def _mean_over_ranks(
        self, size: int | None, loss: "Callable[[RoutedTokens], Tensor]", ranks: Group
    ) -> Tensor:
        """``mean_over_groups`` on several ranks, also on one that has no group."""
        if size is None:
            group = self._divided(lambda values, axis: values.unsqueeze(axis))
            is_real = sum_over_ranks(number_of_tokens(group.logits, group.mask), ranks)[..., 0] > 0
            return loss(group).where(is_real, 0).sum() / is_real.sum().clamp_min(1)

        total, number = self.logits[..., :0, :].sum(), self.logits.new_zeros(())
        for group in self.groups(size):
            group = group._replace(ranks=None)
            is_real = number_of_tokens(group.logits, group.mask)[..., 0] > 0
            total = total + loss(group).where(is_real, 0).sum()
            number = number + is_real.sum()
        together = sum_over_ranks(torch.stack([total, number]), ranks)
        return together[0] / together[1].detach().clamp_min(1)

    def _part(self, start: int, stop: int, size: int) -> "RoutedTokens":
        """Some tokens in a row, in groups."""

        def split(values: Tensor, axis: int) -> Tensor:
            return values.narrow(axis, start, stop - start).unflatten(axis, (-1, size))

        return self._divided(split)

    def _divided(self, split: Callable[[Tensor, int], Tensor]) -> "RoutedTokens":
        """The tokens divided along their axis, whose place ``split`` is told."""
        axis = self.logits.ndim - 2
        mask = None if self.mask is None else split(self.mask, axis)
        logits, noisy, experts = (split(v, axis) for v in (self.logits, self.noisy, self.experts))
        return RoutedTokens(logits, noisy, experts, mask, self.score, self.ranks)
