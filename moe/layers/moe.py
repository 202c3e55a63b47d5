"""The Mixture-of-Experts layer: router, dispatch, experts."""

from functools import partial
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.kernels import Dispatch, Routing, expert_mlp, plan_dispatch
from ironmoe.kernels.activations import get_activation
from ironmoe.kernels.checks import (
    check_counts,
    check_float_dtype,
    check_like_weights,
    check_tokens,
    check_whole,
)
from ironmoe.kernels.route import check_precision
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.layers.expert_linear import ExpertLinear, Offloaded, TwoLayers, run_experts
from ironmoe.moe.layers.expert_rows import expert_rows
from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.ranks import share_out, through_ranks
from ironmoe.moe.layers.timm import as_mlp_layer
from ironmoe.moe.routers.aux_losses import AuxLosses
from ironmoe.moe.routers.capacity import Capacity
from ironmoe.moe.routers.constant_gates import warn_of_constant_gate_after
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routers.masks import checked_mask, without_masked, zero_padding
from ironmoe.moe.routers.top_k import RouterOutput, TopKRouter
from ironmoe.moe.routers.wrapped import unwrapped

_MoE = TypeVar("_MoE", bound="MoE")


class MoE(nn.Module):
    """A drop-in MLP of E experts of which each token takes K. Without a capacity no token is ever
    dropped, and images of a batch do not influence each other.

    In training the router makes a balance loss (none in eval): add ``collect_aux_loss(model)`` to
    your loss, before ``backward()``. ``aux_loss`` is what this layer has for it.

    Args:
        dim: D of the tokens; hidden_dim: F of each expert; num_experts: E; top_k: K, by default
            that of the router, else 2, or 1 of one expert.
        activation: a name in ``ironmoe.kernels.ACTIVATIONS``; a gated one doubles the rows of
            ``fc1``.
        bias: whether the experts have biases.
        router: a module from x (T, D) to RouterOutput; by default ``TopKRouter(dim, num_experts,
            top_k)``. With a capacity it takes the number of tokens in a group as second argument.
        capacity: ``Capacity(…)`` drops what an expert has no place for; None drops nothing.
        shared_dim: hidden width of an expert that every token takes beside its K (DeepSeek,
            Qwen2-MoE); 0: none.
        shared_gate: weigh the shared expert by sigmoid(wᵀ x), as Qwen2-MoE does.
        recompute: keep the tokens for the backward pass instead of the pre-activations, for one
            more product.
        precision: float32 products on a GPU: "ieee", or "tf32" for tensor cores with 10 bits of
            mantissa.
        dispatch_dtype: round tokens on their way to the experts and back to this dtype, as the
            official V-MoE code does in bfloat16.

    Raises:
        ValueError: a size below 1, a router of other sizes, or another argument outside the above.
        TypeError: a size that is no whole number, a router that is no module, a capacity that is
            none.
    """

    offloaded: Offloaded | None = None  # set by ``offload_experts`` while its block runs

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        router: nn.Module | None = None,
        capacity: Capacity | None = None,
        shared_dim: int = 0,
        shared_gate: bool = False,
        recompute: bool = False,
        precision: str = "ieee",
        dispatch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts)
        sizes = {"num_experts": num_experts, "dim": dim}
        if top_k is not None:
            check_whole(top_k=top_k)
            # Where experts choose tokens, no token has a K of its own.
            if not isinstance(router, Grouped):
                sizes["top_k"] = top_k
        check_counts(0, shared_dim=shared_dim)
        if shared_gate and not shared_dim:
            raise ValueError(
                f"shared_dim must be at least 0, and above it for a shared_gate, got {shared_dim} "
                f"with shared_gate={shared_gate}"
            )
        if router is not None and not isinstance(router, nn.Module):
            raise TypeError(
                f"router must be a module, such as a TopKRouter, or None, got {router!r}"
            )
        for name, expected in sizes.items():
            if getattr(router, name, expected) != expected:
                raise ValueError(
                    f"router must have {name} = {expected} like the layer, got "
                    f"{getattr(router, name)}"
                )
        if capacity is not None and not isinstance(capacity, Capacity):
            raise TypeError(f"capacity must be a Capacity or None, got {capacity!r}")
        if capacity is not None and isinstance(router, Grouped):
            raise ValueError(
                f"capacity must be None with a {type(router).__name__}, which has one of its own, "
                f"got {capacity}"
            )
        check_float_dtype(dispatch_dtype, "dispatch_dtype")
        check_float_dtype(dtype)
        wide = 2 * hidden_dim if get_activation(activation).gated else hidden_dim
        check_precision(precision)
        self.dim = dim
        self.num_experts = num_experts
        self.activation = activation
        self.recompute = recompute
        self.precision = precision
        self.dispatch_dtype = dispatch_dtype
        if router is None:
            top_k = min(2, num_experts) if top_k is None else top_k
            router = TopKRouter(dim, num_experts, top_k, device=device, dtype=dtype)
        self.router = router
        self.capacity = capacity
        warn_of_constant_gate_after(capacity, self.router, device)
        self.fc1 = ExpertLinear(num_experts, dim, wide, bias, device, dtype)
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, bias, device, dtype)
        self.shared = Mlp(dim, shared_dim, activation, bias, device, dtype) if shared_dim else None
        self.shared_gate = (
            nn.Linear(dim, 1, bias=False, device=device, dtype=dtype) if shared_gate else None
        )
        self.aux_losses = AuxLosses()
        self.expert_parallel: ExpertParallel | None = None

    def parallelize(
        self: _MoE,
        mesh: Any,
        *,
        gradients: str = "mean",
        aux_losses: str = "rank",
        max_tokens_per_rank: int | None = None,
    ) -> _MoE:
        """Share the experts out over the ranks of a mesh: ``ironmoe.moe.layers.ranks.share_out``,
        which says what the arguments are. Every rank must call it."""
        options: dict[str, Any] = {"gradients": gradients, "aux_losses": aux_losses}
        share_out(self, mesh, max_tokens_per_rank=max_tokens_per_rank, **options)
        return self

    def expert_modules(self) -> dict[str, nn.Module]:
        """The two layers of all experts, by name."""
        return {"fc1": self.fc1, "fc2": self.fc2}

    @staticmethod
    def as_mlp_layer(num_experts: int, top_k: int = 2, **moe_options: Any) -> "type[MoE]":
        """The class that timm takes as ``mlp_layer``: ``ironmoe.moe.layers.timm.as_mlp_layer``."""
        return as_mlp_layer(MoE, num_experts, top_k, **moe_options)

    @property
    def aux_loss(self) -> Tensor | None:
        """Scalar, the sum of the router's losses over the passes since ``collect_aux_loss``; None
        where no pass made one."""
        return self.aux_losses.total()

    @aux_loss.setter
    def aux_loss(self, loss: None) -> None:
        if loss is not None:
            raise ValueError(f"aux_loss must be None, which forgets the losses, got {loss}")
        self.aux_losses.take()

    def train(self: _MoE, mode: bool = True) -> _MoE:
        """As of every module. In eval mode the layer no longer holds the graph of a pass that was
        given up."""
        if not mode:
            self.aux_losses.let_go()
        return super().train(mode)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (…, D) → (…, D). With ``images_per_group`` in the capacity (or router), x must be
        (images, tokens, D).

        Args:
            mask: (…) bool, or 0 and 1: False marks padding, which is no token. It takes no expert
                and no place of a capacity, has no part in a loss or a count, and gets 0. Tokens get
                the same result whatever the padding holds. A router of your own gets zeros
                in place of padding; a loss that it makes must leave them out itself.

        Raises:
            ValueError: x or mask has the wrong shape, the mask the wrong dtype, or x another device
                or (outside autocast) dtype than the weights.
            TypeError: x is no float tensor.
        """
        check_tokens(x, self.dim)

        x_TD = rearrange(x, "... d -> (...) d")
        mask_T = None if mask is None else checked_mask(mask, x.shape[:-1]).flatten()
        if mask_T is not None:
            # before anything is computed: 0 times NaN would reach the gradients of the weights
            x_TD = zero_padding(x_TD, mask_T)
        routed, routing = self._route(x_TD, x.shape, mask_T)
        y_TD = self._experts(x_TD, routing, routed)
        if mask_T is not None:
            y_TD = zero_padding(y_TD, mask_T)

        # as nn.Linear does it: FSDP2 warns of layers that return a view of another tensor
        y = torch.ops.aten._unsafe_view(y_TD, x.shape)
        # in eval a loss is made only inside aux_loss_in_eval, for someone who wants it
        self.aux_losses.add(routed.aux_loss, x, y, keep=not self.training)
        return y

    def _route(
        self, x_TD: Tensor, shape: torch.Size, mask_T: Tensor | None
    ) -> tuple[RouterOutput, Routing]:
        """What the router decided, and what the capacity left of it."""
        router = unwrapped(self.router)
        groups = router if isinstance(router, Grouped) else self._capacity_inside()
        sizes = [] if groups is None else [groups.tokens_in_group(shape)]
        options: dict[str, Any] = {}
        if mask_T is not None and isinstance(router, TopKRouter | Grouped):
            options["mask"] = mask_T
        if len(shape) > 2 and getattr(router, "needs_sequence_length", False):
            # Of Swin's tokens (B, H, W, D) a row of pixels would be taken for a sequence.
            if any(axis > 1 for axis in shape[1:-2]):
                raise ValueError(
                    f"x must have shape (sequences, tokens, {self.dim}) for a balance loss of each "
                    f"sequence, got {tuple(shape)}"
                )
            options["sequence_length"] = shape[-2]
        routed: RouterOutput = self.router(x_TD, *sizes, **options)

        routing = routed.routing
        if mask_T is not None and "mask" not in options:  # a router that knows no mask
            routing = without_masked(routing, mask_T, self.num_experts)
            routed = routed._replace(dispatch=None)
        if self.capacity is not None:
            masked = {} if mask_T is None else {"mask": mask_T}
            routing = self.capacity(routing, self.num_experts, *sizes, **masked)
        return routed, routing

    def _capacity_inside(self) -> Grouped | None:
        """The capacity without wrappers around it."""
        inside = None if self.capacity is None else unwrapped(self.capacity)
        return inside if isinstance(inside, Grouped) else None

    def _experts(self, x_TD: Tensor, routing: Routing, routed: RouterOutput) -> Tensor:
        """The chosen experts and the shared one."""
        shared: list[Tensor] = []

        def add_shared() -> None:
            if self.shared is not None:
                shared.append(self._shared_expert(x_TD))

        if self.expert_parallel is None:
            product = partial(self._with, dispatch_dtype=self.dispatch_dtype)
            y_TD = run_experts(self, x_TD, routing, routed.dispatch, product)
            add_shared()
        else:
            y_TD = through_ranks(
                self.expert_parallel,
                (self.fc1, self.fc2),
                (x_TD, routing, routed.dispatch),
                self._with,
                dispatch_dtype=self.dispatch_dtype,
                meanwhile=add_shared,
            )
        return y_TD + shared[0] if shared else y_TD

    def _with(
        self, routing: Routing, dispatch: Dispatch | None, dispatch_dtype: torch.dtype | None
    ) -> TwoLayers:
        """The product of tokens with the weights of experts that are here."""

        def layer(
            x_TD: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None
        ) -> Tensor:
            check_like_weights(x_TD, w_in)
            options: dict[str, Any] = {
                "b_in": b_in,
                "b_out": b_out,
                "activation": self.activation,
                "precision": self.precision,
            }
            if dispatch is None and dispatch_dtype is None:
                return expert_mlp(x_TD, w_in, w_out, routing, recompute=self.recompute, **options)
            plan = dispatch or plan_dispatch(routing.experts, w_in.shape[0])
            options["dispatch_dtype"] = dispatch_dtype
            return expert_rows(x_TD, w_in, w_out, routing, plan, **options)

        return layer

    def _shared_expert(self, x_TD: Tensor) -> Tensor:
        """What the expert of all tokens gives."""
        assert self.shared is not None
        shared_TD: Tensor = self.shared(x_TD)
        if self.shared_gate is not None:
            shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
        return shared_TD

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, activation={self.activation!r}"
