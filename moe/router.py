"""The top-k router: tokens to gates and experts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing, topk_route
from ironmoe.kernels.route import without_autocast
from ironmoe.moe.losses import balance_loss, importance_loss, load_loss, router_z_loss


class RouterOutput(NamedTuple):
    """What a router decided and why.

    routing:  gates (T, K) and experts (T, K)
    logits:   (T, E) float32 or wider, without noise
    aux_loss: scalar in training, None in eval
    """

    routing: Routing
    logits: Tensor
    aux_loss: Tensor | None


class TopKRouter(nn.Module):
    """Softmax over all experts, then the best K; ties to the lower index (V-MoE, arXiv 2106.05974).

    In training, noise N(0, (noise_std / E)²) is added to the logits before the choice, and ``aux_loss`` is the weighted sum of
    the losses below. In eval neither happens. Logits are computed in float32 at least, also under autocast.

    Args:
        dim: D; num_experts: E ≥ 1; top_k: 1 ≤ K ≤ E.
        renormalize: make the K gates of a token sum to 1 (Mixtral); V-MoE does not.
        noise_std: standard deviation of the noise, times E.
        importance_weight, load_weight, balance_weight, z_weight: factors of the auxiliary losses; load needs noise.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        renormalize: bool = False,
        noise_std: float = 1.0,
        importance_weight: float = 0.005,
        load_weight: float = 0.005,
        balance_weight: float = 0.0,
        z_weight: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_experts < 1:
            raise ValueError(f"dim and num_experts must be at least 1, got dim={dim}, num_experts={num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        if noise_std < 0:
            raise ValueError(f"noise_std must be at least 0, got {noise_std}")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.renormalize, self.noise_std = renormalize, noise_std
        self.importance_weight, self.load_weight = importance_weight, load_weight
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1 / D, as the official code's lecun_normal."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, x_TD: Tensor) -> RouterOutput:
        """x (T, D) → RouterOutput."""
        with without_autocast(x_TD):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = nn.functional.linear(x_TD.to(wide), self.weight.to(wide))
            noisy_TE = logits_TE
            if self.training and self.noise_std > 0:
                noisy_TE = logits_TE + torch.randn_like(logits_TE) * (self.noise_std / self.num_experts)
            routing = topk_route(noisy_TE, self.top_k, renormalize=self.renormalize)
            aux_loss = self._aux_loss(logits_TE, noisy_TE) if self.training else None
        return RouterOutput(routing, logits_TE, aux_loss)

    def _aux_loss(self, logits_TE: Tensor, noisy_TE: Tensor) -> Tensor:
        total = logits_TE.new_zeros(())
        if len(logits_TE) == 0:
            return total
        if self.importance_weight:
            total = total + self.importance_weight * importance_loss(logits_TE.softmax(-1))
        if self.load_weight and self.noise_std > 0:
            std = self.noise_std / self.num_experts
            total = total + self.load_weight * load_loss(logits_TE, noisy_TE, std, self.top_k)
        if self.balance_weight:
            total = total + self.balance_weight * balance_loss(noisy_TE.softmax(-1))
        if self.z_weight:
            total = total + self.z_weight * router_z_loss(logits_TE)
        return total

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, renormalize={self.renormalize}, "
            f"noise_std={self.noise_std}"
        )
