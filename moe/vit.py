"""Vision transformers, dense and with experts: one class, ``VMoE``."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.moe.moe import MoE
from ironmoe.moe.router import TopKRouter

LAYER_NORM_EPS = 1e-6
CLASSIFIERS = ("token", "gap")
STEMS = ("patch", "conv")


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BND), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """The dense two-layer MLP with the tanh form of GELU, as the official ViT's."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


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


class VMoE(nn.Module):
    """Vision transformer whose blocks ``moe_layers`` have experts in place of the MLP; with none it is the dense ViT.

    Equal compute: a token passes K experts, so ``expert_dim = mlp_dim / K`` costs what a dense block of ``mlp_dim`` costs, plus
    the router.

    Args:
        image_size: side of the square images, in pixels; patch_size: side of a patch.
        dim: D; depth: number of blocks; heads: attention heads, dividing ``dim``; mlp_dim: hidden width of the dense MLPs.
        num_classes: C.
        moe_layers: indices of the blocks with experts; negative ones count from the last.
        num_experts: E; top_k: K; expert_dim: hidden width of each expert, by default ``mlp_dim``.
        channels: of the images.
        stem: "patch" is one strided convolution; "conv" is log₂(patch_size) stride-2 convolutions, better on small images.
        classifier: "gap" averages the tokens, "token" prepends a class token.
        router: keyword arguments of ``TopKRouter``, such as ``{"renormalize": True}``.

    Raises:
        ValueError: sizes that do not fit, naming them.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        num_classes: int,
        moe_layers: Iterable[int] = (),
        num_experts: int = 8,
        top_k: int = 2,
        *,
        expert_dim: int | None = None,
        channels: int = 3,
        stem: str = "patch",
        classifier: str = "token",
        router: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, patch_size, dim, depth, heads, stem, classifier)
        moe_layers = [_layer_index(i, depth) for i in moe_layers]
        self.image_size, self.channels, self.num_classes, self.classifier = image_size, channels, num_classes, classifier
        self.stem = (
            _conv_stem(channels, dim, patch_size) if stem == "conv" else nn.Conv2d(channels, dim, patch_size, patch_size)
        )
        num_tokens = math.ceil(image_size / patch_size) ** 2
        self.cls = nn.Parameter(torch.zeros(1, 1, dim)) if classifier == "token" else None
        self.pos_embedding = nn.Parameter(torch.empty(1, num_tokens + (self.cls is not None), dim))

        def mlp(layer: int) -> nn.Module:
            if layer not in moe_layers:
                return Mlp(dim, mlp_dim)
            top_k_router = TopKRouter(dim, num_experts, top_k, **(router or {}))
            return MoE(dim, expert_dim or mlp_dim, num_experts, top_k, activation="gelu_tanh", router=top_k_router)

        self.blocks = nn.ModuleList(Block(dim, heads, mlp(i)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official code's initial values: Xavier uniform weights, zero biases, N(0, 0.02²) positions, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_embedding, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, image_size, image_size) → logits (B, C)."""
        expected = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        x_BND = rearrange(self.stem(images), "b d h w -> b (h w) d")
        if self.cls is not None:
            x_BND = torch.cat([self.cls.expand(len(x_BND), -1, -1), x_BND], dim=1)
        x_BND = x_BND + self.pos_embedding
        for block in self.blocks:
            x_BND = block(x_BND)
        x_BND = self.norm(x_BND)
        return self.head(x_BND[:, 0] if self.cls is not None else x_BND.mean(1))


def _conv_stem(channels: int, dim: int, patch_size: int) -> nn.Sequential:
    """Stride-2 3×3 convolutions down to the patch grid, GELU between them; widths double up to ``dim``."""
    steps = int(math.log2(patch_size))
    widths = [channels, *(max(8, dim >> (steps - 1 - i)) for i in range(steps - 1)), dim]
    layers: list[nn.Module] = []
    for i in range(steps):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _layer_index(layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise ValueError(f"moe_layers must name blocks from {-depth} to {depth - 1}, got {layer}")
    return layer % depth


def _check_sizes(image_size: int, patch_size: int, dim: int, depth: int, heads: int, stem: str, classifier: str) -> None:
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {STEMS}, got {stem!r}")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {CLASSIFIERS}, got {classifier!r}")
    if min(image_size, patch_size, dim, depth, heads) < 1:
        raise ValueError(f"sizes must be at least 1, got {image_size=}, {patch_size=}, {dim=}, {depth=}, {heads=}")
    if dim % heads:
        raise ValueError(f"heads must divide dim = {dim}, got {heads}")
    if stem == "patch" and image_size % patch_size:
        raise ValueError(f"patch_size must divide image_size = {image_size} with the patch stem, got {patch_size}")
    if stem == "conv" and (patch_size < 2 or patch_size & (patch_size - 1)):
        raise ValueError(f"patch_size must be a power of two, 2 or more, with the conv stem, got {patch_size}")
