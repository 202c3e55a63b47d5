"""What a vision transformer has beside its MLPs: self-attention, the block, and pooling by
attention."""

import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.moe.layers.mlp import Mlp

LAYER_NORM_EPS = 1e-6


def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """Scaled dot-product attention (B, H, N, D) in the dtype of ``q``.

    On CPU the fused kernel's backward pass takes up to 7 times as long in bfloat16 as in float32
    (torch 2.13, 16 tokens), so float32 it is there.
    """
    dtype = q_BHND.dtype
    if q_BHND.device.type != "cpu" or dtype.itemsize >= 4:
        return nn.functional.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)
    with torch.autocast("cpu", enabled=False):
        return nn.functional.scaled_dot_product_attention(
            q_BHND.float(), k_BHND.float(), v_BHND.float()
        ).to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x_BND), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        attended = attend(q, k, v)
        return self.proj(rearrange(attended, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block; ``mlp`` is dense or an MoE."""

    def __init__(self, dim: int, heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = mlp

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class AttentionPool(nn.Module):
    """The "map" classifier: a learned query attends to all tokens, then an MLP with a residual; (B,
    N, D) → (B, D)."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_dim)
        nn.init.xavier_uniform_(self.probe)

    def forward(self, x_BND: Tensor) -> Tensor:
        q = rearrange(self.q(self.probe), "one n (h d) -> one h n d", h=self.heads).expand(
            x_BND.shape[0], -1, -1, -1
        )
        k, v = rearrange(self.kv(x_BND), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        attended = attend(q, k, v)
        pooled_BD = self.proj(rearrange(attended, "b h one d -> b (one h d)"))
        return pooled_BD + self.mlp(self.norm(pooled_BD))
