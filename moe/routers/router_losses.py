"""The auxiliary loss of a router, and the table of its balance losses."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ironmoe.kernels.route import transformed
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.routers.balance import (
    choice_counts,
    deepseek_balance_loss,
    global_batch_balance_loss,
    mixtral_balance_loss,
)
from ironmoe.moe.routers.global_load import GlobalLoad
from ironmoe.moe.routers.losses import balance_loss, importance_loss, load_loss, router_z_loss
from ironmoe.moe.routers.routed_tokens import RoutedTokens

GROUP, SEQUENCE, GLOBAL_BATCH = "group", "sequence", "global batch"


class BalanceLoss(NamedTuple):
    """A balance loss that a router can have.

    value: groups of tokens (…, G, S, E) and the load (…, E) of the global batch to one number a
        group, (…, G); the load is None unless ``over`` is "global batch".
    over: which tokens are a group: those of the router's "group", those of a "sequence", or, for
        "global batch", all that are there.
    """

    value: Callable[[RoutedTokens, Tensor | None], Tensor]
    over: str = GROUP


def _gshard(tokens: RoutedTokens, _: Tensor | None) -> Tensor:
    return balance_loss(tokens.noisy.softmax(-1), mask=tokens.mask, ranks=tokens.ranks)


def _mixtral(tokens: RoutedTokens, _: Tensor | None) -> Tensor:
    return mixtral_balance_loss(tokens.scores, tokens.experts, mask=tokens.mask, ranks=tokens.ranks)


def _deepseek(tokens: RoutedTokens, _: Tensor | None) -> Tensor:
    return deepseek_balance_loss(
        tokens.scores, tokens.experts, mask=tokens.mask, ranks=tokens.ranks
    )


def _global_batch(tokens: RoutedTokens, load_E: Tensor | None) -> Tensor:
    assert load_E is not None
    load_1E = load_E.unsqueeze(-2)
    return global_batch_balance_loss(tokens.scores, load_1E, mask=tokens.mask, ranks=tokens.ranks)


BALANCE_LOSSES = {
    "gshard": BalanceLoss(_gshard),
    "mixtral": BalanceLoss(_mixtral),
    "deepseek": BalanceLoss(_deepseek),
    "deepseek_sequence": BalanceLoss(_deepseek, SEQUENCE),
    "global_batch": BalanceLoss(_global_batch, GLOBAL_BATCH),
}
"""name → balance loss, as ``balance`` of ``TopKRouter``."""


def get_balance_loss(name: str) -> BalanceLoss:
    """The balance loss called ``name``. ValueError names the known ones."""
    if not isinstance(name, str) or name not in BALANCE_LOSSES:
        raise ValueError(f"balance must be one of {tuple(BALANCE_LOSSES)}, got {name!r}")
    return BALANCE_LOSSES[name]


class LossOptions(Protocol):
    """What a router says about its losses."""

    training: bool
    top_k: int
    noise_std: float
    importance_weight: float
    load_weight: float
    balance: str
    balance_weight: float
    z_weight: float
    global_load: GlobalLoad
    loss_ranks: Group | None


def auxiliary_loss(
    router: LossOptions,
    tokens: RoutedTokens,
    tokens_per_group: int | None,
    sequence_length: int | None,
) -> Tensor:
    """Scalar: the weighted sum of the losses, each the mean over its groups with a real token. In a
    training step it is over the tokens of all ``router.loss_ranks``."""
    if _is_part_of_a_step(router):
        tokens = tokens._replace(ranks=router.loss_ranks)
    total = tokens.mean_over_groups(
        tokens_per_group, lambda group: _losses_but_balance(router, group)
    )
    if not router.balance_weight:
        return total

    form = get_balance_loss(router.balance)
    load_E = _global_load(router, tokens) if form.over == GLOBAL_BATCH else None
    sizes = {GROUP: tokens_per_group, SEQUENCE: sequence_length or tokens_per_group}
    balance = tokens.mean_over_groups(sizes.get(form.over), lambda group: form.value(group, load_E))
    return total + router.balance_weight * balance


def _losses_but_balance(router: LossOptions, group: RoutedTokens) -> Tensor:
    """(…, G), one number a group."""
    logits_GSE = group.logits
    real: dict[str, Any] = {"mask": group.mask, "ranks": group.ranks}
    total_G = logits_GSE.new_zeros(logits_GSE.shape[:-2])
    if router.importance_weight:
        gates_GSE = logits_GSE.softmax(-1)
        total_G = total_G + router.importance_weight * importance_loss(gates_GSE, **real)
    if router.load_weight and router.noise_std > 0 and router.training:
        std = router.noise_std / logits_GSE.shape[-1]
        load_G = load_loss(logits_GSE, group.noisy, std, router.top_k, **real)
        total_G = total_G + router.load_weight * load_G
    if router.z_weight:
        total_G = total_G + router.z_weight * router_z_loss(logits_GSE, **real)
    return total_G


def _global_load(router: LossOptions, tokens: RoutedTokens) -> Tensor:
    """(…, E)."""
    counts_E = choice_counts(tokens.experts, tokens.logits.shape[-1], mask=tokens.mask)
    return router.global_load.add(counts_E) if _is_part_of_a_step(router) else counts_E


def _is_part_of_a_step(router: LossOptions) -> bool:
    """Whether this pass is part of a training step. One in eval mode, inside a transform of
    torch.func or for torch.export is not: its tokens and its load are its own, and no other process
    is asked."""
    return router.training and not transformed() and not torch.compiler.is_exporting()
