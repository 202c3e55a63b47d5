"""nn.Linear with the initial values of the official ViT code.

Each is an nn.Linear to whatever looks for one, and resets itself: no module resets the parameters
of another.
"""

import torch
from torch import nn


class XavierLinear(nn.Linear):
    """nn.Linear whose weights start Xavier uniform, and whose bias starts at 0."""

    def reset_parameters(self) -> None:
        """Weights uniform between ±√(6 / (in_features + out_features)), bias 0."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """nn.Linear whose weights start at 0, and whose bias starts at one value: a classifier's head.

    Args:
        initial_bias: the value; the rest as nn.Linear.
    """

    initial_bias = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        initial_bias: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.initial_bias = initial_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights 0, bias ``initial_bias``."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.initial_bias)
