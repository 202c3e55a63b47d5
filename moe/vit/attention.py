"""What a vision transformer has beside its MLPs: self-attention, the block, and pooling by
attention."""

import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.moe.layers.layer_norm import LayerNorm
from ironmoe.moe.layers.linear import XavierLinear
from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE
from ironmoe.moe.routers.masks import zero_padding
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.vit.attend import attend

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D). The mask (B, N) leaves padding out of the keys; the
    result is 0 there."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = XavierLinear(dim, 3 * dim)
        self.proj = XavierLinear(dim, dim)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x_BND), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        attended = attend(q, k, v, mask_BN)
        y_BND = self.proj(rearrange(attended, "b h n d -> b n (h d)"))
        return y_BND if mask_BN is None else zero_padding(y_BND, mask_BN)


class Block(nn.Module):
    """Pre-norm transformer block; ``mlp`` is dense or an MoE.

    With a mask (B, N), padding must be 0 in x, and it is 0 in the result. ``MoE`` and ``SoftMoE``
    are called with the mask; any other ``mlp`` is not, and sees padding as tokens of zeros.
    """

    def __init__(self, dim: int, heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = mlp

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        if mask_BN is None:
            x_BND = x_BND + self.attn(self.norm1(x_BND))
            return x_BND + self.mlp(self.norm2(x_BND))

        x_BND = x_BND + self.attn(self.norm1(x_BND), mask_BN)
        normed_BND = self.norm2(x_BND)
        if isinstance(unwrapped(self.mlp), MoE | SoftMoE):
            return x_BND + self.mlp(normed_BND, mask=mask_BN)
        y_BND = self.mlp(zero_padding(normed_BND, mask_BN))
        return x_BND + zero_padding(y_BND, mask_BN)


class AttentionPool(nn.Module):
    """The "map" classifier: a learned query attends to all tokens, then an MLP with a residual; (B,
    N, D) → (B, D). The mask (B, N) leaves padding out."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        self.q = XavierLinear(dim, dim)
        self.kv = XavierLinear(dim, 2 * dim)
        self.proj = XavierLinear(dim, dim)
        self.norm = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The probe Xavier uniform; the layers reset themselves."""
        nn.init.xavier_uniform_(self.probe)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        q = rearrange(self.q(self.probe), "one n (h d) -> one h n d", h=self.heads).expand(
            x_BND.shape[0], -1, -1, -1
        )
        k, v = rearrange(self.kv(x_BND), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        attended = attend(q, k, v, mask_BN)
        pooled_BD = self.proj(rearrange(attended, "b h one d -> b (one h d)"))
        return pooled_BD + self.mlp(self.norm(pooled_BD))
