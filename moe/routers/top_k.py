"""The top-k router: tokens to gates and experts."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.kernels import Dispatch, ExpertGroups, Routing, topk_route
from ironmoe.kernels.checks import (
    check_counts,
    check_device,
    check_float_dtype,
    check_tokens,
    check_whole,
)
from ironmoe.kernels.route import exporting, recomputing, transformed, without_autocast
from ironmoe.kernels.topk import gates_of_choice
from ironmoe.kernels.types import GateRule
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.routers.constant_gates import warn_of_constant_gate
from ironmoe.moe.routers.global_load import GlobalLoad
from ironmoe.moe.routers.masks import checked_mask, without_masked, zero_padding
from ironmoe.moe.routers.routed_tokens import RoutedTokens
from ironmoe.moe.routers.router_losses import SEQUENCE, auxiliary_loss, get_balance_loss
from ironmoe.moe.routers.selection_bias import WithSelectionBias


class RouterOutput(NamedTuple):
    """What a router decided and why.

    routing:  gates (T, K) and experts (T, K)
    logits:   (T, E) float32 or wider, without noise
    aux_loss: scalar in training (and in eval under ``aux_loss_in_eval``), else None
    dispatch: the rows of each expert, where the router knows them already
    """

    routing: Routing
    logits: Tensor
    aux_loss: Tensor | None = None
    dispatch: Dispatch | None = None


def router_options(router: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of a router that a model makes for each of its layers; {} for None.

    Raises:
        TypeError: it is something else, such as a router.
    """
    if router is None:
        return {}
    if not isinstance(router, Mapping):
        raise TypeError(
            f"router must be a dict of TopKRouter's arguments or None, got {router!r}: a router "
            "of your own belongs into MoE(router=…)"
        )
    return dict(router)


class TopKRouter(WithSelectionBias):
    """Scores all experts and takes the best K; ties to the lower index. The defaults are V-MoE's
    (arXiv 2106.05974).

    In training, noise N(0, (noise_std / E)²) is added to the logits before the choice, and
    ``aux_loss`` is the weighted sum of the losses below: one sum for each group, then their mean.
    In eval there is neither noise nor loss. Logits are computed in float32 at least, also under
    autocast. Set ``router.noise`` to a standard normal tensor (T, E) to use it in place of fresh
    noise.

    docs/routers.md lists which arguments make which router of Hugging Face's model families.

    Args:
        dim: D; num_experts: E ≥ 1; top_k: 1 ≤ K ≤ E.
        renormalize: make the K gates of a token sum to 1 (Mixtral); V-MoE does not. A number p:
            divide by their p-norm (DBRX). With K = 1 every gate is then 1, so the task never trains
            the router: a UserWarning says so.
        noise_std: standard deviation of the noise, times E.
        importance_weight, load_weight, balance_weight, z_weight: factors of the auxiliary losses;
            load needs noise.
        balance: which loss ``balance_weight`` weighs, by its name in
            ``ironmoe.moe.BALANCE_LOSSES``: "gshard" by the best expert of each token; by all K
            choices "mixtral", "deepseek", "deepseek_sequence" and "global_batch", for which
            ``start_global_batch(model)`` belongs into each step.
        score: a name in ``ironmoe.kernels.scores.SCORES``: "softmax", "sigmoid" or "sqrtsoftplus".
        order: "score_first" scores all experts and picks the best; "topk_first" picks by logit and
            scores only the K chosen.
        groups: keep only the best groups of experts before the choice (DeepSeek).
        scale: factor on the gates, after renormalising (DeepSeek's routed_scaling_factor).
        bias: whether the logits have a learned bias (gpt-oss).
        selection_bias: keep a buffer (E,), added to what is compared and never to what weighs;
            ``update_selection_bias`` moves it so that loads even out without a loss (arXiv
            2408.15664).
        jitter: in training, multiply x by uniform noise from 1 − jitter to 1 + jitter (Switch,
            arXiv 2101.03961).
        softcap: cut the logits smoothly, softcap · tanh(logits / softcap).

    Attributes:
        loss_ranks: the ranks over whose tokens a loss of training is computed; None: this one alone
            (``parallelize(…, aux_losses=…)``).

    Raises:
        ValueError: an argument outside the values above.
        TypeError: a size that is no whole number.
    """

    noise: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        renormalize: bool | float = False,
        noise_std: float = 1.0,
        importance_weight: float = 0.005,
        load_weight: float = 0.005,
        balance_weight: float = 0.0,
        balance: str = "gshard",
        z_weight: float = 0.0,
        score: str = "softmax",
        order: str = "score_first",
        groups: ExpertGroups | None = None,
        scale: float = 1.0,
        bias: bool = False,
        selection_bias: bool = False,
        jitter: float = 0.0,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_experts=num_experts)
        check_whole(top_k=top_k)
        check_float_dtype(dtype)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        if noise_std < 0:
            raise ValueError(f"noise_std must be at least 0, got {noise_std}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {jitter}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be above 0 or None, got {softcap}")
        if not isinstance(renormalize, bool) and not renormalize > 0:
            raise ValueError(
                f"renormalize must be True, False or the p > 0 of a norm, got {renormalize}"
            )
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.noise_std = noise_std
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        get_balance_loss(balance)  # ValueError where it is unknown
        if balance != "gshard" and balance_weight == 0:
            warnings.warn(
                f"balance={balance!r} has no effect while balance_weight is 0", stacklevel=2
            )
        self.balance = balance
        self.balance_weight = balance_weight
        self.global_load = GlobalLoad()
        self.loss_ranks: Group | None = None
        self.z_weight = z_weight
        self.score = score
        self.order = order
        self.groups = groups
        self.scale = scale
        self.jitter = jitter
        self.softcap = softcap
        self.aux_loss_in_eval = False
        self.noise = None

        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        self.make_selection_bias(num_experts if selection_bias else None, device, dtype)

        # A trial call: it raises the ValueError of these arguments.
        logits = torch.zeros(1, num_experts, device="cpu")
        topk_route(logits, top_k, score=score, order=order, groups=groups)
        warn_of_constant_gate(self, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1 / D, as the official code's lecun_normal; biases and counts 0."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_selection_bias()
        self.global_load.reset()

    @property
    def has_loss(self) -> bool:
        """Whether an auxiliary loss has a weight."""
        weights = (self.importance_weight, self.load_weight, self.balance_weight, self.z_weight)
        return any(weights)

    @property
    def needs_sequence_length(self) -> bool:
        """Whether ``forward`` wants to know ``sequence_length``."""
        return get_balance_loss(self.balance).over == SEQUENCE

    def forward(
        self,
        x_TD: Tensor,
        tokens_per_group: int | None = None,
        *,
        mask: Tensor | None = None,
        sequence_length: int | None = None,
    ) -> RouterOutput:
        """x (T, D) → RouterOutput.

        Args:
            tokens_per_group: how many tokens share an auxiliary loss; by default all.
            mask: (T,) bool, False marks padding, whose choices are dropped (expert E, gate 0) and
                which no loss and no count sees, whatever it holds.
            sequence_length: how many tokens in a row are a sequence, for a loss by sequences; by
                default a group.

        Raises:
            ValueError: x or mask has the wrong shape, the mask the wrong dtype, or x another device
                than the weights.
            TypeError: x is no float tensor.
        """
        check_tokens(x_TD, self.dim)
        check_device(x_TD, self.weight)
        if mask is not None:
            mask = checked_mask(mask, x_TD.shape[:-1])
            x_TD = zero_padding(x_TD, mask)
        self.widen_selection_bias()
        with without_autocast(x_TD):
            if self.training and self.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_TE = self._logits(x_TD)
            noisy_TE = self._with_noise(logits_TE)
            routing = self._route(self._over_all_experts(noisy_TE))
            if mask is not None:
                routing = without_masked(routing, mask, self.num_experts)
            if self.training and self.choices is not None and self._counts():
                self.count_choices(routing.experts)
            aux_loss = None
            if (self.training or self.aux_loss_in_eval) and not exporting():
                experts = self._own_experts(routing.experts)
                mask = None if mask is None else mask.view(experts.shape[:-1])
                tokens = RoutedTokens(logits_TE, noisy_TE, experts, mask, self.score)
                aux_loss = auxiliary_loss(self, tokens, tokens_per_group, sequence_length)
        return RouterOutput(routing, self._over_all_experts(logits_TE), aux_loss)

    def gates_of(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """(T, K) gates that this router's rule gives to these experts, chosen or not, from
        ``RouterOutput.logits``."""
        rule = GateRule(self.score, self.order, self.renormalize is True, self.scale)
        return self._by_p_norm(gates_of_choice(logits_TE, experts_TK.long(), rule))

    def _logits(self, x_TD: Tensor) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        logits_TE = nn.functional.linear(x_TD.to(wide), self.weight.to(wide), bias)
        if self.softcap is None:
            return logits_TE
        return self.softcap * (logits_TE / self.softcap).tanh()

    def _counts(self) -> bool:
        """Whether this pass is one to count: neither repeated nor inside a transform of torch.func,
        which allows no change of what lies outside."""
        return not recomputing() and not transformed()

    def _over_all_experts(self, logits_TE: Tensor) -> Tensor:
        """(T, E), whatever shape the logits of a subclass have."""
        return logits_TE

    def _own_experts(self, experts_TK: Tensor) -> Tensor:
        """(…, T, K), the choices as indices into the last axis of the logits, whatever shape those
        of a subclass have."""
        return experts_TK

    def _with_noise(self, logits_TE: Tensor) -> Tensor:
        if not self.training or self.noise_std == 0:
            return logits_TE
        noise_TE = torch.randn_like(logits_TE) if self.noise is None else self.noise.to(logits_TE)
        if noise_TE.shape != logits_TE.shape:
            raise ValueError(
                f"noise must have the shape of the logits, {tuple(logits_TE.shape)}, got "
                f"{tuple(noise_TE.shape)}"
            )
        return logits_TE + noise_TE * (self.noise_std / logits_TE.shape[-1])

    def _route(self, noisy_TE: Tensor) -> Routing:
        routing = topk_route(
            noisy_TE,
            self.top_k,
            score=self.score,
            order=self.order,
            renormalize=self.renormalize is True,
            selection_bias=self.selection_bias,
            groups=self.groups,
            scale=self.scale,
        )
        return routing._replace(gates=self._by_p_norm(routing.gates))

    def _by_p_norm(self, gates_TK: Tensor) -> Tensor:
        if isinstance(self.renormalize, bool):
            return gates_TK
        norm_T1 = gates_TK.norm(self.renormalize, dim=-1, keepdim=True)
        return gates_TK * (self.scale / norm_T1.clamp_min(torch.finfo(norm_T1.dtype).tiny))

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave the injected noise behind: it belongs to one batch."""
        return {**self.__dict__, "noise": None}

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"score={self.score!r}, renormalize={self.renormalize}, noise_std={self.noise_std}"
        )
