"""The Mixture-of-Experts layer: router, dispatch, experts."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.kernels import expert_mlp
from ironmoe.kernels.activations import get_activation
from ironmoe.kernels.route import check_precision
from ironmoe.moe.router import RouterOutput, TopKRouter


class ExpertLinear(nn.Module):
    """The stacked weights of one layer of all experts: ``weight`` (E, N, D) and ``bias`` (E, N), each as nn.Linear's."""

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
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert Xavier uniform on its own, bias 0: experts start different, so that they can specialise."""
        bound = math.sqrt(6 / sum(self.weight.shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return (
            f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"
        )


class MoE(nn.Module):
    """A drop-in MLP of E experts of which each token takes K. No capacity: no token is ever dropped, so images of a batch
    do not influence each other.

    After a forward in training, ``aux_loss`` holds the router's balance loss (None in eval): add ``collect_aux_loss(model)``
    to your loss.

    Args:
        dim: D of the tokens; hidden_dim: F of each expert; num_experts: E; top_k: K.
        activation: a name in ``ironmoe.kernels.ACTIVATIONS``; a gated one doubles the rows of ``fc1``.
        bias: whether the experts have biases.
        router: a module from x (T, D) to RouterOutput; by default ``TopKRouter(dim, num_experts, top_k)``.
        recompute: keep the tokens for the backward pass instead of the pre-activations, for one more product.
        precision: float32 products on a GPU: "ieee", or "tf32" for tensor cores with 10 bits of mantissa.
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
        recompute: bool = False,
        precision: str = "ieee",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        wide = 2 * hidden_dim if get_activation(activation).gated else hidden_dim
        check_precision(precision)
        self.dim, self.num_experts, self.activation = dim, num_experts, activation
        self.recompute, self.precision = recompute, precision
        self.router = router or TopKRouter(dim, num_experts, top_k, device=device, dtype=dtype)
        self.fc1 = ExpertLinear(num_experts, dim, wide, bias, device, dtype)
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, bias, device, dtype)
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, D)."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have {self.dim} features on its last axis, got shape {tuple(x.shape)}")
        x_TD = rearrange(x, "... d -> (...) d")
        routed: RouterOutput = self.router(x_TD)
        self.aux_loss = routed.aux_loss
        y_TD = expert_mlp(
            x_TD,
            self.fc1.weight,
            self.fc2.weight,
            routed.routing,
            b_in=self.fc1.bias,
            b_out=self.fc2.bias,
            activation=self.activation,
            recompute=self.recompute,
            precision=self.precision,
        )
        return y_TD.view(x.shape)

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave out the last forward's loss: it hangs on a graph, which cannot be copied."""
        return {**self.__dict__, "aux_loss": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, activation={self.activation!r}"
