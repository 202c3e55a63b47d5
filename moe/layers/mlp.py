"""The dense two-layer MLP."""

import torch
from torch import Tensor, nn

from ironmoe.kernels.activations import get_activation
from ironmoe.moe.layers.linear import XavierLinear


class Mlp(nn.Module):
    """fc2(act(fc1(x))): the MLP of a dense block, by default with the tanh form of GELU as the
    official ViT's, and the shared expert beside routed ones. Its weights start Xavier uniform and
    its biases at 0, as those of the experts do.

    Args:
        dim: D; hidden_dim: F; activation: a name in ``ironmoe.kernels.ACTIVATIONS``; a gated one
            doubles the rows of ``fc1``.
        bias: whether the layers have biases.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wide = 2 * hidden_dim if get_activation(activation).gated else hidden_dim
        self.activation = activation
        self.fc1 = XavierLinear(dim, wide, bias, device, dtype)
        self.fc2 = XavierLinear(hidden_dim, dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, D)."""
        return self.fc2(get_activation(self.activation).value(self.fc1(x)))
