"""Expert Choice: each expert takes its best tokens (arXiv 2202.09368).

Shape suffixes: T tokens, D their width, E experts, R rows of an expert; G groups, S tokens of a
group, C tokens that an expert takes of it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels import Dispatch, Routing
from ironmoe.kernels.checks import check_counts, check_device, check_float_dtype, check_tokens
from ironmoe.kernels.onnx_graph import stable_sort
from ironmoe.kernels.route import exporting, without_autocast
from ironmoe.moe.routers.capacity import places, places_of
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routers.masks import checked_mask, zero_padding
from ironmoe.moe.routers.top_k import RouterOutput


class ExpertChoiceRouter(Grouped):
    """Softmax over experts; then each expert takes the C tokens of a group with the largest gates,
    and of equal ones the earlier. The load is even by construction, so there is no auxiliary loss.
    A token may get any number of experts, also none.

    Tokens of a group compete: the experts of a token depend on all others, also on later ones.

    The Routing it gives has K = E: entry e of a token is expert e, or dropped (E) with gate 0 where
    e did not choose the token.

    Args:
        dim: D; num_experts: E.
        factor: C = ⌈factor · S / E⌉ for groups of S tokens, rounded up to a multiple of
            ``multiple_of``, at most S.
        images_per_group, tokens_per_group: what a group is; by default the whole batch.
        noise_std: in training, noise N(0, (noise_std / E)²) on the logits.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        factor: float = 1.0,
        *,
        images_per_group: int | None = None,
        tokens_per_group: int | None = None,
        multiple_of: int = 4,
        noise_std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(images_per_group, tokens_per_group)
        check_counts(dim=dim, num_experts=num_experts, multiple_of=multiple_of)
        check_float_dtype(dtype)
        if not factor > 0:
            raise ValueError(f"factor must be above 0, got {factor}")
        if noise_std < 0:
            raise ValueError(f"noise_std must be at least 0, got {noise_std}")
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = num_experts
        self.factor = factor
        self.multiple_of = multiple_of
        self.noise_std = noise_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1 / D."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(
        self, x_TD: Tensor, tokens_per_group: int | None = None, *, mask: Tensor | None = None
    ) -> RouterOutput:
        """x (T, D) → RouterOutput with routing (T, E).

        ``mask`` (T,) bool: False marks padding, which no expert chooses and which does not count in
        S. How many rows an expert has is then not known beforehand, and ``dispatch`` is None.

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
        elif exporting():  # the sizes of ``_choose`` depend on how many tokens the last group has
            mask = torch.ones_like(x_TD[:, 0], dtype=torch.bool)
        with without_autocast(x_TD):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = nn.functional.linear(x_TD.to(wide), self.weight.to(wide))
            noisy_TE = logits_TE
            if self.training and self.noise_std > 0:
                std = self.noise_std / self.num_experts
                noisy_TE = logits_TE + torch.randn_like(logits_TE) * std
            gates_TE = noisy_TE.softmax(-1)
        size = tokens_per_group or x_TD.shape[0]
        plan: Dispatch | None = None
        if mask is None:
            plan = self._choose(gates_TE.detach(), size)
            chosen_TE = plan.slot_row >= 0
        else:
            chosen_TE = self._chosen_of_real(gates_TE.detach(), size, mask)
        experts_E = torch.arange(self.num_experts, dtype=torch.int32, device=x_TD.device)
        experts_TE = experts_E.where(chosen_TE, self.num_experts)
        routing = Routing(gates_TE.masked_fill(~chosen_TE, 0), experts_TE)
        return RouterOutput(routing, logits_TE, None, plan)

    def _choose(self, gates_TE: Tensor, tokens_per_group: int) -> Dispatch:
        """Each expert's tokens, as rows sorted by expert and then by token. All sizes are known
        beforehand."""
        num_tokens = len(gates_TE)
        size = max(min(tokens_per_group, num_tokens), 1)
        whole = num_tokens // size * size
        if whole:
            gates_GSE = gates_TE[:whole].unflatten(0, (-1, size))
        else:
            gates_GSE = gates_TE.new_zeros(0, 1, self.num_experts)
        tokens_ER = self._best(gates_GSE)
        if whole < num_tokens:  # the last group is smaller
            tokens_ER = torch.cat([tokens_ER, whole + self._best(gates_TE[whole:][None])], dim=1)

        integers: dict[str, Any] = {"dtype": torch.int32, "device": gates_TE.device}
        rows_each = tokens_ER.shape[1]
        rows_ER = torch.arange(tokens_ER.numel(), **integers).view(tokens_ER.shape)
        slot_row_ET = torch.full((self.num_experts, num_tokens), -1, **integers)
        experts_E = torch.arange(self.num_experts + 1, **integers)
        return Dispatch(
            offsets=experts_E * rows_each,
            row_token=tokens_ER.flatten().to(torch.int32),
            row_slot=experts_E[:-1].repeat_interleave(rows_each),
            slot_row=slot_row_ET.scatter_(1, tokens_ER, rows_ER).T.contiguous(),
        )

    def _best(self, gates_GSE: Tensor) -> Tensor:
        """(E, G · C) the tokens each expert takes from these groups, in their order."""
        num_groups, size, _ = gates_GSE.shape
        count = min(places(size, self.num_experts, self.factor, self.multiple_of), size)
        order_GES = gates_GSE.transpose(1, 2).sort(dim=2, descending=True, stable=True).indices
        best_GEC = order_GES[..., :count].sort(dim=2).values
        first_G = torch.arange(0, num_groups * size, size, device=gates_GSE.device)
        return (best_GEC + first_G[:, None, None]).transpose(0, 1).flatten(1)

    def _chosen_of_real(self, gates_TE: Tensor, tokens_per_group: int, mask_T: Tensor) -> Tensor:
        """(T, E) bool: whether the expert takes the token, a real one."""
        gates_GSE = self.in_groups(gates_TE, tokens_per_group)
        mask_GS1 = self.in_groups(mask_T[:, None], tokens_per_group)

        last_GSE = gates_GSE.where(mask_GS1, -1)  # gates are at least 0
        _, order_GSE = stable_sort(last_GSE, 1, descending=True)
        _, rank_GSE = stable_sort(order_GSE, 1)
        count_G = places_of(mask_GS1.sum((1, 2)), self.num_experts, self.factor, self.multiple_of)
        chosen_GSE = (rank_GSE < count_G[:, None, None]) & mask_GS1
        return self.out_of_groups(chosen_GSE, gates_TE.shape[0])

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, factor={self.factor}, "
            f"{super().extra_repr()}"
        )
