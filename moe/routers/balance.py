"""Balance losses of what was really routed, E · Σₑ fₑ Pₑ: fₑ says how often expert e was chosen and
is a constant, Pₑ is its mean share of a token's scores and has the gradient.

Shape suffixes: T tokens, E experts, K choices. Leading axes are groups or sequences, each with a
loss of its own.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ironmoe.kernels.route import transformed
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.sums import sum_over_ranks
from ironmoe.moe.routers.masks import (
    checked_mask_of,
    mean_over_tokens,
    number_of_tokens,
    zero_padding,
)


def mixtral_balance_loss(
    scores_TE: Tensor,
    experts_TK: Tensor,
    *,
    mask: Tensor | None = None,
    ranks: Group | None = None,
) -> Tensor:
    """E · Σₑ fₑ Pₑ with fₑ the choices of expert e a token, which sum to K: the loss of Mixtral,
    Qwen, OLMoE and DBRX (``load_balancing_loss_func`` of transformers; GShard 2006.16668 and Switch
    2101.03961 have it for K = 1).

    K at perfect balance. transformers computes one loss for all layers together: for its value,
    concatenate the tokens of the layers.

    Args:
        scores_TE: (…, T, E) scores ≥ 0 of all experts, such as the softmax of the logits; those of
            a token are divided by their sum.
        experts_TK: (…, T, K) integers, the choices; E and more stands for a dropped one, which
            does not count.
        mask: (…, T) bool, True for a real token; the others do not count, whatever they hold. A
            group without a real token has the loss 0.
        ranks: the loss is that of the tokens of all these ranks together, each of which must call
            this with as many groups. Its gradient is the sum of those of the losses of all ranks.

    Returns:
        (…), in the dtype of the scores.

    Raises:
        TypeError, ValueError: an argument has another type, dtype or shape, as two that changed
            places have.
        ExchangeError: a rank did not take part.
    """
    _check_scores(scores_TE)
    _check_experts(experts_TK)
    if experts_TK.shape[:-1] != scores_TE.shape[:-1]:
        raise ValueError(
            f"experts must have shape {(*scores_TE.shape[:-1], 'K')} like the scores, got "
            f"{tuple(experts_TK.shape)}"
        )
    mask = checked_mask_of(scores_TE, mask)
    load_E = choice_counts(experts_TK, scores_TE.shape[-1], mask=mask)
    count_1 = number_of_tokens(experts_TK, mask)
    if ranks is not None:
        together = sum_over_ranks(torch.cat([load_E, count_1], dim=-1), ranks)
        load_E, count_1 = together[..., :-1], together[..., -1:]
    share_E = load_E.to(scores_TE.dtype) / count_1.clamp_min(1)
    return _balance(scores_TE, share_E, mask, ranks)


def deepseek_balance_loss(
    scores_TE: Tensor,
    experts_TK: Tensor,
    *,
    mask: Tensor | None = None,
    ranks: Group | None = None,
) -> Tensor:
    """``mixtral_balance_loss`` divided by K, so that it is 1 at perfect balance whatever K is: the
    expert-level balance loss of DeepSeekMoE (arXiv 2401.06066, equations 12 to 14) and DeepSeek-V2
    (2405.04434), without the factor α.

    With the sigmoid scores of the B sequences of a batch, (B, S, E), it is the sequence-wise loss
    of DeepSeek-V3 (2412.19437, equations 17 to 20), one number a sequence. Equation 18 takes the K
    best scores without a selection bias for the choices; ``scores.topk(K).indices`` are those.

    Args:
        scores_TE, experts_TK, mask, ranks: as for ``mixtral_balance_loss``.
    """
    loss = mixtral_balance_loss(scores_TE, experts_TK, mask=mask, ranks=ranks)
    return loss / experts_TK.shape[-1]


def global_batch_balance_loss(
    scores_TE: Tensor,
    load_E: Tensor,
    *,
    mask: Tensor | None = None,
    ranks: Group | None = None,
) -> Tensor:
    """E · Σₑ fₑ Pₑ with the shares fₑ of a load that was counted elsewhere, as over the micro-
    batches and processes of a global batch (Qwen3, arXiv 2501.11873); P is that of these tokens.

    1 at perfect balance.

    Args:
        scores_TE: (…, T, E) scores ≥ 0 of all experts; those of a token are divided by their sum.
        load_E: (…, E) how often each expert was chosen, the sum of ``choice_counts``.
        mask: (…, T) bool, and ranks, as for ``mixtral_balance_loss``; the load is taken as it is.

    Raises:
        TypeError, ValueError: as ``mixtral_balance_loss``.
    """
    _check_scores(scores_TE)
    if load_E.shape[-1] != scores_TE.shape[-1]:
        raise ValueError(
            f"load must have shape (…, {scores_TE.shape[-1]}), a number for each expert, got "
            f"{tuple(load_E.shape)}"
        )
    mask = checked_mask_of(scores_TE, mask)
    load_E = load_E.detach().to(scores_TE.dtype)
    return _balance(scores_TE, load_E / load_E.sum(-1, keepdim=True).clamp_min(1), mask, ranks)


@torch.no_grad()
def choice_counts(experts_TK: Tensor, num_experts: int, *, mask: Tensor | None = None) -> Tensor:
    """(…, E) int64: how many tokens chose each expert.

    Args:
        experts_TK: (…, T, K) integers; E and more stands for a dropped choice, which does not
            count.
        num_experts: E.
        mask: (…, T) bool, True for a real token; the others do not count.

    Raises:
        TypeError, ValueError: experts are no integers, or the mask has another dtype or shape.
    """
    _check_experts(experts_TK)
    mask = checked_mask_of(experts_TK, mask)
    # The experts of a token are different ones, so a mark says all, and marks need no atomic sums.
    column_TK = experts_TK.long().clamp_max(num_experts)
    marks_TE = column_TK.new_zeros(*experts_TK.shape[:-1], num_experts + 1, dtype=torch.bool)
    chosen_TE = marks_TE.scatter(-1, column_TK, True)[..., :num_experts]
    if mask is not None:
        chosen_TE = chosen_TE & mask[..., None]
    return chosen_TE.sum(-2)


def _check_scores(scores_TE: Tensor) -> None:
    if not scores_TE.is_floating_point() or scores_TE.ndim < 2:
        raise ValueError(
            f"scores must be floats of shape (…, T, E), got {scores_TE.dtype} of shape "
            f"{tuple(scores_TE.shape)}; scores come first, experts or loads second"
        )


def _check_experts(experts_TK: Tensor) -> None:
    if experts_TK.is_floating_point() or experts_TK.dtype == torch.bool:
        raise ValueError(f"experts must be integers of shape (…, T, K), got {experts_TK.dtype}")


def _balance(scores_TE: Tensor, load_E: Tensor, mask: Tensor | None, ranks: Group | None) -> Tensor:
    if mask is not None:
        scores_TE = zero_padding(scores_TE, mask)
    total_T1 = scores_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)
    share_E = mean_over_tokens(scores_TE / total_T1, mask, ranks)
    with _kept_by_the_graph():
        weighted_E = load_E * share_E
    return scores_TE.shape[-1] * weighted_E.sum(-1)


def _kept_by_the_graph() -> AbstractContextManager[object]:
    """A block whose operations keep what they need themselves, also inside activation
    checkpointing, which would compute it again: the load of a global batch may have grown then."""
    if torch.compiler.is_compiling() or transformed():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
