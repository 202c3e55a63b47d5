"""Auxiliary losses that keep routers balanced and their logits small, in float32 or wider: one
number, or one a group."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ironmoe.kernels.checks import check_module
from ironmoe.kernels.route import exporting
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.routers.aux_losses import AuxLosses
from ironmoe.moe.routers.masks import (
    checked_mask_of,
    mean_over_tokens,
    sum_over_tokens,
    zero_padding,
)
from ironmoe.moe.routers.wrapped import unwrapped


def importance_loss(
    gates_TE: Tensor, *, mask: Tensor | None = None, ranks: Group | None = None
) -> Tensor:
    """Squared coefficient of variation of each expert's summed gates (V-MoE, arXiv 2106.05974,
    appendix A).

    Args:
        gates_TE: (…, T, E) softmax of the noise-free logits, all experts. Leading axes are groups,
            each with a loss of its own.
        mask: (…, T) bool, True for a real token; the others do not count, whatever they hold. A
            group without a real token has the loss 0.
        ranks: the loss is that of the tokens of all these ranks together, each of which must call
            this with as many groups. Its gradient is the sum of those of the losses of all ranks.

    Raises:
        TypeError, ValueError: the mask is no tensor, or has another dtype or shape.
        ExchangeError: a rank did not take part.
    """
    mask = checked_mask_of(gates_TE, mask)
    if mask is None and ranks is None:
        return _squared_variation(gates_TE.sum(-2))
    return _squared_variation_of_real(*sum_over_tokens(gates_TE, mask, ranks))


def load_loss(
    logits_TE: Tensor,
    noisy_logits_TE: Tensor,
    noise_std: float,
    top_k: int,
    *,
    mask: Tensor | None = None,
    ranks: Group | None = None,
) -> Tensor:
    """Squared coefficient of variation of the expected load under fresh noise (V-MoE, appendix A).

    The probability that expert e would still be chosen if the noise were drawn again is 1 − Φ((thr
    − logits) / noise_std), with thr the K-th largest noisy logit of the token; gradients flow
    through thr too, as in the official code.

    Args:
        logits_TE: (…, T, E) noise-free logits; noisy_logits_TE: the same plus the noise the router
            used.
        noise_std: the standard deviation of that noise, > 0.
        top_k: K.
        mask: (…, T) bool, and ranks, as for ``importance_loss``.
    """
    if noise_std <= 0:
        raise ValueError(
            f"noise_std must be above 0 (the load is an expectation over noise), got {noise_std}"
        )
    mask = checked_mask_of(logits_TE, mask)
    if mask is not None:
        logits_TE = zero_padding(logits_TE, mask)
        noisy_logits_TE = zero_padding(noisy_logits_TE, mask)
    threshold_T1 = noisy_logits_TE.topk(top_k, dim=-1).values[..., -1:]
    z = (threshold_T1 - logits_TE) / noise_std
    probability_TE = torch.special.ndtr(-z)
    if mask is None and ranks is None:
        return _squared_variation(probability_TE.mean(-2))
    total_E, count_1 = sum_over_tokens(probability_TE, mask, ranks)
    return _squared_variation_of_real(total_E / count_1.clamp_min(1), count_1)


def balance_loss(
    gates_TE: Tensor, *, mask: Tensor | None = None, ranks: Group | None = None
) -> Tensor:
    """E · Σₑ fₑ Pₑ: the share of tokens whose best expert is e times its mean gate (GShard
    2006.16668, Switch 2101.03961).

    1 at perfect balance, E when one expert takes all.

    Args:
        gates_TE: (…, T, E) softmax of the logits, all experts.
        mask: (…, T) bool, and ranks, as for ``importance_loss``.
    """
    num_experts = gates_TE.shape[-1]
    mask = checked_mask_of(gates_TE, mask)
    if mask is not None:
        gates_TE = zero_padding(gates_TE, mask)
    experts_E = torch.arange(num_experts, device=gates_TE.device)
    first_choice_TE = (gates_TE.argmax(-1, keepdim=True) == experts_E).to(gates_TE.dtype)
    share_E = mean_over_tokens(first_choice_TE, mask, ranks)
    return num_experts * (share_E * mean_over_tokens(gates_TE, mask, ranks)).sum(-1)


def router_z_loss(
    logits_TE: Tensor, *, mask: Tensor | None = None, ranks: Group | None = None
) -> Tensor:
    """Mean squared log-partition of the logits (…, T, E) (ST-MoE, arXiv 2202.08906, equation 5).
    ``mask`` (…, T) bool, and ``ranks``, as for ``importance_loss``."""
    mask = checked_mask_of(logits_TE, mask)
    if mask is not None:
        logits_TE = zero_padding(logits_TE, mask)
    square_T1 = logits_TE.logsumexp(-1, keepdim=True).square()
    return mean_over_tokens(square_T1, mask, ranks).squeeze(-1)


def collect_aux_loss(model: nn.Module) -> Tensor:
    """The sum of the auxiliary losses of all layers and all their forward passes since the last
    call, and leaves none behind; 0 where there is none. Add it to your loss, once a step, before
    ``backward()``.

    A pass that activation checkpointing repeats adds nothing, and neither does one that a backward
    pass has used up beside one that it has not. Where a trained router's loss has no gradient any
    more, it is added as a number, and a UserWarning names the layer and what to do. Modules of
    other libraries take part by a tensor in their attribute ``aux_loss``, which becomes None.

    Raises:
        TypeError: the model is no module.
        RuntimeError: torch.export traces a model that trains; its program would have no losses.
    """
    check_module(model)
    if exporting() and any(
        module.training for module in model.modules() if "aux_losses" in vars(module)
    ):
        raise RuntimeError(
            "collect_aux_loss must be called outside torch.export, whose programs have no "
            "auxiliary losses: export the model without this call, or model.eval()"
        )
    total = torch.zeros(())
    for name, module in model.named_modules():
        losses, warning = _taken(module)
        if losses is not None:
            total = total.to(losses.device) + losses
        if warning and torch.is_grad_enabled() and _is_trained(module):
            warnings.warn(
                f"the auxiliary loss of {name or type(module).__name__} has no gradient, or only "
                f"for a part of its passes: {warning}",
                stacklevel=2,
            )
    return total


def _taken(module: nn.Module) -> tuple[Tensor | None, str]:
    """Of the module itself: a wrapper shows the attributes of what it holds."""
    own = vars(module)
    if isinstance(own.get("aux_losses"), AuxLosses):
        return own["aux_losses"].take()
    loss = own.get("aux_loss")
    if not isinstance(loss, Tensor):
        return None, ""
    own["aux_loss"] = None
    return loss, ""


def _is_trained(layer: nn.Module) -> bool:
    """Whether the layer has a router that a loss could train."""
    router = layer._modules.get("router")
    if router is None or not getattr(unwrapped(router), "has_loss", True):
        return False
    return any(parameter.requires_grad for parameter in router.parameters())


@contextmanager
def aux_loss_in_eval(model: nn.Module) -> Iterator[None]:
    """Routers compute ``aux_loss`` in eval mode, too, while the block runs: without noise, and so
    without the load loss.

    The paper's attack may ascend the auxiliary loss of a model in eval mode; outside this block
    eval computes none.

    Raises:
        TypeError: the model is no module.
    """
    check_module(model)
    # their own: a wrapper shows the attributes of what it holds
    routers = [module for module in model.modules() if "aux_loss_in_eval" in vars(module)]
    before = [router.aux_loss_in_eval for router in routers]
    try:
        for router in routers:
            router.aux_loss_in_eval = True  # type: ignore[assignment]
        yield
    finally:
        for router, value in zip(routers, before, strict=True):
            router.aux_loss_in_eval = value


def _squared_variation(values_E: Tensor) -> Tensor:
    """(std / mean)², population std; by the variance, because the root has no gradient at perfect
    balance (NaN at E = 2)."""
    return values_E.var(-1, correction=0) / values_E.mean(-1).square()


def _squared_variation_of_real(values_E: Tensor, count_1: Tensor) -> Tensor:
    """The same; 0 in a group without a real token, whose values have no mean to divide by. count:
    (…, 1), how many real tokens there are."""
    return _squared_variation(values_E.where(count_1 > 0, 1))
