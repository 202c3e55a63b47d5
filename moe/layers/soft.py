"""Soft MoE: experts work on mixtures of tokens (arXiv 2308.00951).

Shape suffixes: B images, N tokens of an image, D their width, E experts, P slots of an expert, R
rows.
"""

from typing import Any, TypeVar

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from ironmoe.kernels import Routing, expert_mlp
from ironmoe.kernels.activations import get_activation
from ironmoe.kernels.autograd.softmax import softmax
from ironmoe.kernels.checks import (
    check_counts,
    check_device,
    check_float_dtype,
    check_floats,
    check_like_weights,
)
from ironmoe.kernels.route import check_precision, without_autocast
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.layers.expert_linear import ExpertLinear, Offloaded, TwoLayers, run_experts
from ironmoe.moe.layers.ranks import share_out, through_ranks
from ironmoe.moe.routers.masks import checked_mask, zero_padding

_SoftMoE = TypeVar("_SoftMoE", bound="SoftMoE")


class SoftMoE(nn.Module):
    """Each of E · P slots takes a softmax-weighted mixture of all tokens of an image, its expert
    works on it, and each token takes a softmax-weighted mixture of all slots. Fully differentiable;
    nothing is dropped, and images do not influence each other.

    Scores are scale · x̂ᵀ φ̂ with x and φ normalised to length 1, as in the official code. They are
    computed in float32 at least.

    Args:
        dim: D; hidden_dim: F of each expert; num_experts: E; slots_per_expert: P.
        activation: a name in ``ironmoe.kernels.ACTIVATIONS``; bias: whether the experts have
            biases.
        noise_std: in training, standard deviation of noise on the scores.
        dispatch_dtype: round tokens before they are mixed, and slots before they are mixed back, to
            this dtype; the official code rounds to bfloat16.
        precision: float32 products on a GPU, as in ``MoE``.
    """

    offloaded: Offloaded | None = None  # set by ``offload_experts`` while its block runs

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        slots_per_expert: int = 1,
        *,
        activation: str = "gelu",
        bias: bool = True,
        noise_std: float = 0.0,
        dispatch_dtype: torch.dtype | None = None,
        precision: str = "ieee",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            dim=dim,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            slots_per_expert=slots_per_expert,
        )
        check_float_dtype(dispatch_dtype, "dispatch_dtype")
        check_float_dtype(dtype)
        if noise_std < 0:
            raise ValueError(f"noise_std must be at least 0, got {noise_std}")
        check_precision(precision)

        wide = 2 * hidden_dim if get_activation(activation).gated else hidden_dim
        self.dim = dim
        self.num_experts = num_experts
        self.slots_per_expert = slots_per_expert
        self.activation = activation
        self.noise_std = noise_std
        self.dispatch_dtype = dispatch_dtype
        self.precision = precision
        self.phi = nn.Parameter(
            torch.empty(num_experts, slots_per_expert, dim, device=device, dtype=dtype)
        )
        # one axis, because FSDP2 cannot shard a scalar
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.fc1 = ExpertLinear(num_experts, dim, wide, bias, device, dtype)
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, bias, device, dtype)
        self.expert_parallel: ExpertParallel | None = None
        self.reset_parameters()

    def parallelize(
        self: _SoftMoE,
        mesh: Any,
        *,
        gradients: str = "mean",
        aux_losses: str = "rank",
        max_tokens_per_rank: int | None = None,
    ) -> _SoftMoE:
        """Share the experts out over the ranks of a mesh: ``ironmoe.moe.layers.ranks.share_out``,
        which says what the arguments are. Every rank must call it."""
        options: dict[str, Any] = {"gradients": gradients, "aux_losses": aux_losses}
        share_out(self, mesh, max_tokens_per_rank=max_tokens_per_rank, **options)
        return self

    def expert_modules(self) -> dict[str, nn.Module]:
        """The two layers of all experts, by name."""
        return {"fc1": self.fc1, "fc2": self.fc2}

    def reset_parameters(self) -> None:
        """φ normal with variance 1 / D, scale 1."""
        nn.init.normal_(self.phi, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) → (B, N, D).

        Args:
            mask: (B, N) bool, or 0 and 1: False marks padding, which is no token. No slot takes any
                of it, whatever it holds, and it gets 0. An image without a token gets zeros.

        Raises:
            ValueError: x or mask has the wrong shape, the mask the wrong dtype, or x another device
                or (outside autocast) dtype than the weights.
            TypeError: x is no float tensor.
        """
        check_floats(x_BND, f"(images, tokens, {self.dim})")
        if x_BND.ndim != 3 or x_BND.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape (images, tokens, {self.dim}), got {tuple(x_BND.shape)}"
            )

        check_device(x_BND, self.phi)
        mask_BN = None if mask is None else checked_mask(mask, x_BND.shape[:-1])
        if mask_BN is not None:
            x_BND = zero_padding(x_BND, mask_BN)

        with without_autocast(x_BND):
            scores_BNEP = self.scores(x_BND, mask_BN)
            dispatch_BNEP = softmax(scores_BNEP, 1)
            combine_BNEP = softmax(scores_BNEP.flatten(2), -1).view_as(scores_BNEP)
            rounded_BND = self._rounded(x_BND)
            slots_EBPD = einsum(dispatch_BNEP, rounded_BND, "b n e p, b n d -> e b p d")
            slots_EBPD = slots_EBPD.to(x_BND.dtype)

        y_EBPD = self._experts(slots_EBPD)
        with without_autocast(x_BND):
            y_BND = einsum(combine_BNEP, self._rounded(y_EBPD), "b n e p, e b p d -> b n d")
        y_BND = y_BND.to(y_EBPD.dtype)
        return y_BND if mask_BN is None else zero_padding(y_BND, mask_BN)

    def scores(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, E, P) float32 or wider, with noise in training. Their softmax over N mixes tokens
        into slots; their softmax over (E, P) mixes slots into tokens.

        Args:
            mask: (B, N) as in ``forward``. Padding has the lowest score that there is, so no slot
                takes any of it. In an image without a token all softmaxes are even.
        """
        mask_BN = None if mask is None else checked_mask(mask, x_BND.shape[:-1])
        if mask_BN is not None:
            x_BND = zero_padding(x_BND, mask_BN)

        wide = torch.promote_types(x_BND.dtype, torch.float32)
        phi_EPD = _unit(self.phi.to(wide)) * self.scale.to(wide)
        scores_BNEP = einsum(_unit(x_BND.to(wide)), phi_EPD, "b n d, e p d -> b n e p")
        if self.training and self.noise_std > 0:
            scores_BNEP = scores_BNEP + self.noise_std * torch.randn_like(scores_BNEP)
        if mask_BN is None:
            return scores_BNEP
        # not −∞, whose softmax over (E, P) would be NaN
        return scores_BNEP.masked_fill(~mask_BN[..., None, None], torch.finfo(wide).min)

    def _experts(self, slots_EBPD: Tensor) -> Tensor:
        """Every slot through its expert, with gate 1."""
        experts, images, slots, _ = slots_EBPD.shape
        rows_RD = rearrange(slots_EBPD, "e b p d -> (e b p) d")
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        gates_R1 = torch.ones(rows_RD.shape[0], 1, dtype=wide, device=rows_RD.device)
        experts_E = torch.arange(experts, dtype=torch.int32, device=rows_RD.device)
        experts_R1 = experts_E[:, None].expand(-1, images * slots).reshape(-1, 1)
        routing = Routing(gates_R1, experts_R1)
        if self.expert_parallel is None:
            y_RD = run_experts(self, rows_RD, routing, None, self._with)
        else:
            modules = self.fc1, self.fc2
            tokens = rows_RD, routing, None
            y_RD = through_ranks(self.expert_parallel, modules, tokens, self._with)
        return y_RD.view(slots_EBPD.shape)

    def _with(self, routing: Routing, *_: Any) -> TwoLayers:
        """The product of slots with the weights of experts that are here."""

        def layer(
            x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None
        ) -> Tensor:
            check_like_weights(x, w_in)
            options: dict[str, Any] = {"activation": self.activation, "precision": self.precision}
            return expert_mlp(x, w_in, w_out, routing, b_in=b_in, b_out=b_out, **options)

        return layer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Checkpoints of ironmoe 0.1 have the scale without an axis."""
        scale = state_dict.get(f"{prefix}scale")
        if scale is not None and scale.ndim == 0:
            state_dict[f"{prefix}scale"] = scale[None]
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _rounded(self, values: Tensor) -> Tensor:
        """In float32 or wider, after rounding to ``dispatch_dtype`` where there is one."""
        wide = torch.promote_types(values.dtype, torch.float32)
        if self.dispatch_dtype is not None:
            values = values.to(self.dispatch_dtype)
        return values.to(wide)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, "
            f"slots_per_expert={self.slots_per_expert}"
        )


def _unit(values: Tensor) -> Tensor:
    """Vectors along the last axis scaled to length 1, as the official code does it:
    x / √(|x|² + 10⁻⁶)."""
    return values * (values.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
