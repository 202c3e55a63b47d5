"""Routing of an efficient ensemble: each member has experts of its own (E³, arXiv 2110.03360)."""

import torch
from einops import rearrange
from torch import Tensor

from ironmoe.kernels.checks import check_counts, check_whole
from ironmoe.moe.routers.top_k import RouterOutput, TopKRouter


class EnsembleRouter(TopKRouter):
    """M members share one layer. The tokens come M times over, all of member 0 first; member m
    chooses among the E / M experts m · E / M … only, so the matrix of gates is block diagonal.
    Noise and auxiliary losses are those of M routers with E / M experts.

    Args:
        ensemble_size: M, dividing E; K ≤ E / M. The rest as ``TopKRouter``; ``weight`` is (E, D),
            member after member.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 2, *, ensemble_size: int, **options: object
    ) -> None:
        check_counts(num_experts=num_experts, ensemble_size=ensemble_size)
        check_whole(top_k=top_k)
        if num_experts % ensemble_size:
            raise ValueError(
                f"ensemble_size must divide num_experts = {num_experts}, got {ensemble_size}"
            )
        if top_k > num_experts // ensemble_size:
            raise ValueError(
                f"top_k must be at most the {num_experts // ensemble_size} experts of a member, "
                f"got {top_k}"
            )
        for name in ("groups", "bias", "selection_bias", "softcap"):
            if options.get(name):
                raise ValueError(f"EnsembleRouter has no {name}, got {options[name]}")
        super().__init__(dim, num_experts, top_k, **options)  # type: ignore[arg-type]
        self.ensemble_size = ensemble_size

    def forward(
        self,
        x_TD: Tensor,
        tokens_per_group: int | None = None,
        *,
        mask: Tensor | None = None,
        sequence_length: int | None = None,
    ) -> RouterOutput:
        """x (T, D), member after member → RouterOutput over all E experts; logits of other members'
        experts are −∞. The other arguments are those of ``TopKRouter``."""
        if x_TD.shape[0] % self.ensemble_size:
            raise ValueError(
                f"x must hold the same tokens for {self.ensemble_size} members, got "
                f"{x_TD.shape[0]} tokens"
            )
        return super().forward(x_TD, tokens_per_group, mask=mask, sequence_length=sequence_length)

    def _logits(self, x_TD: Tensor) -> Tensor:
        """(M, T / M, E / M)."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_MTD = rearrange(x_TD.to(wide), "(m t) d -> m t d", m=self.ensemble_size)
        weight_MDE = rearrange(self.weight.to(wide), "(m e) d -> m d e", m=self.ensemble_size)
        return x_MTD @ weight_MDE

    def _over_all_experts(self, logits_MTE: Tensor) -> Tensor:
        members = self.ensemble_size
        own_MN = torch.eye(members, dtype=torch.bool, device=logits_MTE.device)
        blocks_MTNE = logits_MTE[:, :, None].where(own_MN[:, None, :, None], float("-inf"))
        return rearrange(blocks_MTNE, "m t n e -> (m t) (n e)")

    def _own_experts(self, experts_TK: Tensor) -> Tensor:
        """(M, T / M, K), counted from the first expert of the member."""
        experts_MTK = rearrange(experts_TK, "(m t) k -> m t k", m=self.ensemble_size)
        size = self.num_experts // self.ensemble_size
        first_M = torch.arange(self.ensemble_size, device=experts_TK.device) * size
        return experts_MTK - first_M[:, None, None]
