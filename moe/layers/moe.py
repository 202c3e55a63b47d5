"""The Mixture-of-Experts layer: router, dispatch, experts."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.kernels import Routing, expert_mlp, plan_dispatch
from ironmoe.kernels.activations import get_activation
from ironmoe.kernels.route import check_precision
from ironmoe.moe.layers.expert_rows import expert_rows
from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.timm import as_mlp_layer
from ironmoe.moe.routers.capacity import Capacity
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routers.top_k import RouterOutput, TopKRouter


class ExpertLinear(nn.Module):
    """The stacked weights of one layer of all experts: ``weight`` (E, N, D) and ``bias`` (E, N),
    each as nn.Linear's."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert Xavier uniform on its own, bias 0: experts start different, so that they can
        specialise."""
        bound = math.sqrt(6 / sum(self.weight.shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return (
            f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}, "
            f"bias={self.bias is not None}"
        )


class MoE(nn.Module):
    """A drop-in MLP of E experts of which each token takes K. Without a capacity no token is ever
    dropped, and images of a batch do not influence each other.

    After a forward in training, ``aux_loss`` holds the router's balance loss (None in eval): add
    ``collect_aux_loss(model)`` to your loss.

    Args:
        dim: D of the tokens; hidden_dim: F of each expert; num_experts: E; top_k: K.
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
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
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
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        if shared_dim < 0 or (shared_gate and not shared_dim):
            raise ValueError(
                f"shared_dim must be at least 0, and above it for a shared_gate, got {shared_dim} "
                f"with shared_gate={shared_gate}"
            )
        for name, expected in {"num_experts": num_experts, "dim": dim}.items():
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
        if dispatch_dtype is not None and not dispatch_dtype.is_floating_point:
            raise ValueError(f"dispatch_dtype must be a float dtype or None, got {dispatch_dtype}")
        wide = 2 * hidden_dim if get_activation(activation).gated else hidden_dim
        check_precision(precision)
        self.dim = dim
        self.num_experts = num_experts
        self.activation = activation
        self.recompute = recompute
        self.precision = precision
        self.dispatch_dtype = dispatch_dtype
        self.router = router or TopKRouter(dim, num_experts, top_k, device=device, dtype=dtype)
        self.capacity = capacity
        self.fc1 = ExpertLinear(num_experts, dim, wide, bias, device, dtype)
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, bias, device, dtype)
        self.shared = Mlp(dim, shared_dim, activation, bias, device, dtype) if shared_dim else None
        self.shared_gate = (
            nn.Linear(dim, 1, bias=False, device=device, dtype=dtype) if shared_gate else None
        )
        self.aux_loss: Tensor | None = None

    @staticmethod
    def as_mlp_layer(num_experts: int, top_k: int = 2, **moe_options: Any) -> "type[MoE]":
        """The class that timm takes as ``mlp_layer``: ``ironmoe.moe.layers.timm.as_mlp_layer``."""
        return as_mlp_layer(MoE, num_experts, top_k, **moe_options)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, D). With ``images_per_group`` in the capacity (or router), x must be
        (images, tokens, D)."""
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have {self.dim} features on its last axis, got shape {tuple(x.shape)}"
            )

        x_TD = rearrange(x, "... d -> (...) d")
        groups = self.router if isinstance(self.router, Grouped) else self.capacity
        if groups is None:
            routed: RouterOutput = self.router(x_TD)
        else:
            routed = self.router(x_TD, groups.tokens_in_group(x.shape))
        self.aux_loss = routed.aux_loss
        routing = routed.routing
        if self.capacity is not None:
            size = self.capacity.tokens_in_group(x.shape)
            routing = self.capacity(routing, self.num_experts, size)

        y_TD = self._experts(x_TD, routing, routed)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view(x.shape)

    def _experts(self, x_TD: Tensor, routing: Routing, routed: RouterOutput) -> Tensor:
        options: dict[str, Any] = {
            "b_in": self.fc1.bias,
            "b_out": self.fc2.bias,
            "activation": self.activation,
            "precision": self.precision,
        }
        if routed.dispatch is None and self.dispatch_dtype is None:
            return expert_mlp(
                x_TD, self.fc1.weight, self.fc2.weight, routing, recompute=self.recompute, **options
            )
        dispatch = routed.dispatch or plan_dispatch(routing.experts, self.num_experts)
        w_in, w_out = self.fc1.weight, self.fc2.weight
        return expert_rows(
            x_TD, w_in, w_out, routing, dispatch, dispatch_dtype=self.dispatch_dtype, **options
        )

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave out the loss of the last forward: it belongs to a graph, which
        cannot be copied."""
        return {**self.__dict__, "aux_loss": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, activation={self.activation!r}"
