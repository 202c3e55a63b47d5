"""Vision transformers, dense and with experts: one class, ``VMoE``."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.capacity import Capacity
from ironmoe.moe.routers.ensemble import EnsembleRouter
from ironmoe.moe.routers.top_k import TopKRouter
from ironmoe.moe.vit.attention import LAYER_NORM_EPS, AttentionPool, Block
from ironmoe.moe.vit.configs import from_config
from ironmoe.moe.vit.jax_weights import from_jax, to_jax
from ironmoe.moe.vit.placement import placement
from ironmoe.moe.vit.positions import resize_positions

CLASSIFIERS = ("token", "gap", "map")
STEMS = ("patch", "conv")


class VMoE(nn.Module):
    """Vision transformer whose blocks ``moe_layers`` have experts in place of the MLP; with none it
    is the dense ViT.

    Equal compute: a token passes K experts, so ``expert_dim = mlp_dim / K`` costs what a dense
    block of ``mlp_dim`` costs, plus the router.

    Args:
        image_size: side of the square images, in pixels; patch_size: side of a patch.
        dim: D; depth: number of blocks; heads: attention heads, dividing ``dim``; mlp_dim: hidden
            width of the dense MLPs.
        num_classes: C.
        moe_layers: the blocks with experts: "every 2", "last 2", "all" or indices, as ``placement``
            reads them.
        num_experts: E; top_k: K; expert_dim: hidden width of each expert, by default ``mlp_dim``.
        channels: of the images.
        stem: "patch" is one strided convolution; "conv" is log₂(patch_size) stride-2 convolutions,
            better on small images.
        classifier: "token" prepends a class token, "gap" averages the tokens, "map" pools them by
            attention.
        representation_size: width of a tanh layer before the head; None leaves it out.
        head_bias: the head's initial bias; the official configurations take −log C.
        router: keyword arguments of ``TopKRouter``, such as ``{"renormalize": True}``.
        capacity: as in ``MoE``; every MoE layer drops by the same rule. None: dropless.
        dispatch_dtype: as in ``MoE``; the official configurations take bfloat16.
        ensemble_size: M > 1 makes the efficient ensemble E³ (arXiv 2110.03360): from the first MoE
            layer on, each image is M members' image, member m has its own E / M experts, and
            ``forward`` gives the log of the members' mean probability.
        make_moe: builds the layer of each block in ``moe_layers``, in place of the MoE made from
            the arguments above; for example
            ``lambda: SoftMoE(384, 1536, 8, 16, activation="gelu_tanh")``.

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
        moe_layers: str | Iterable[int] = (),
        num_experts: int = 8,
        top_k: int = 2,
        *,
        expert_dim: int | None = None,
        channels: int = 3,
        stem: str = "patch",
        classifier: str = "token",
        representation_size: int | None = None,
        head_bias: float = 0.0,
        router: dict[str, Any] | None = None,
        capacity: Capacity | None = None,
        dispatch_dtype: torch.dtype | None = None,
        ensemble_size: int = 1,
        make_moe: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, patch_size, dim, depth, heads, stem=stem, classifier=classifier)
        moe_layers = placement(moe_layers, depth, "moe_layers")
        if ensemble_size < 1 or (ensemble_size > 1 and not moe_layers):
            raise ValueError(
                f"ensemble_size must be at least 1, and 1 without moe_layers, got {ensemble_size}"
            )
        if representation_size is not None and representation_size < 1:
            raise ValueError(
                f"representation_size must be at least 1 or None, got {representation_size}"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels
        self.num_classes = num_classes
        self.classifier = classifier
        self.head_bias = head_bias
        self.ensemble_size = ensemble_size
        self.first_moe = min(moe_layers, default=depth)

        if stem == "conv":
            self.stem: nn.Module = _conv_stem(channels, dim, patch_size)
        else:
            self.stem = nn.Conv2d(channels, dim, patch_size, patch_size)
        num_tokens = math.ceil(image_size / patch_size) ** 2
        self.cls = nn.Parameter(torch.zeros(1, 1, dim)) if classifier == "token" else None
        self.pos_embedding = nn.Parameter(torch.empty(1, num_tokens + (self.cls is not None), dim))

        def moe() -> nn.Module:
            if make_moe is not None:
                return make_moe()
            if ensemble_size > 1:
                route: nn.Module = EnsembleRouter(
                    dim, num_experts, top_k, ensemble_size=ensemble_size, **(router or {})
                )
            else:
                route = TopKRouter(dim, num_experts, top_k, **(router or {}))
            limit = capacity
            if isinstance(capacity, Capacity):
                limit = capacity.for_members(ensemble_size)
            return MoE(
                dim,
                expert_dim or mlp_dim,
                num_experts,
                top_k,
                activation="gelu_tanh",
                router=route,
                capacity=limit,
                dispatch_dtype=dispatch_dtype,
            )

        mlps = (moe() if i in moe_layers else Mlp(dim, mlp_dim) for i in range(depth))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp) for mlp in mlps)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.pool = AttentionPool(dim, heads, mlp_dim) if classifier == "map" else None
        self.pre_logits = nn.Linear(dim, representation_size) if representation_size else None
        self.head = nn.Linear(representation_size or dim, num_classes)
        self.reset_parameters()

    @classmethod
    def from_config(cls, name: str, **options: Any) -> "VMoE":
        """A model of the papers' families by name, such as "V-MoE-B/16" or "ViT-B++/32":
        ``ironmoe.moe.vit.configs``."""
        return from_config(cls, name, **options)

    @classmethod
    def from_jax(cls, params: Mapping[str, np.ndarray], **options: Any) -> "VMoE":
        """The model of an official V-MoE or ViT checkpoint:
        ``ironmoe.moe.vit.jax_weights.from_jax``."""
        return from_jax(cls, params, **options)

    def to_jax(self) -> dict[str, np.ndarray]:
        """The weights by their official names and in their official layout:
        ``ironmoe.moe.vit.jax_weights.to_jax``."""
        return to_jax(self)

    def reset_parameters(self) -> None:
        """The official code's initial values: Xavier uniform weights, zero biases, N(0, 0.02²)
        positions, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_embedding, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.head_bias)

    @torch.no_grad()
    def resize(self, image_size: int) -> "VMoE":
        """Take images of another size from now on; returns the model.

        The position embeddings are interpolated linearly over the grid, and corners stay corners:
        the official code does so between resolutions (224 → 384). The embedding of the class token
        stays as it is.
        """
        kinds = {"stem": self._stem_kind, "classifier": self.classifier}
        _check_sizes(image_size, self.patch_size, dim=1, depth=1, heads=1, **kinds)
        side = math.ceil(image_size / self.patch_size)
        resized = resize_positions(self.pos_embedding, side, has_token=self.cls is not None)
        self.pos_embedding = nn.Parameter(resized, requires_grad=self.pos_embedding.requires_grad)
        self.image_size = image_size
        return self

    @property
    def _stem_kind(self) -> str:
        return "patch" if isinstance(self.stem, nn.Conv2d) else "conv"

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, image_size, image_size) → logits (B, C); of an ensemble,
        log-probabilities."""
        logits_MBC = self.member_logits(images)
        if self.ensemble_size == 1:
            return logits_MBC[0]
        return logits_MBC.log_softmax(-1).logsumexp(0) - math.log(self.ensemble_size)

    def member_logits(self, images: Tensor) -> Tensor:
        """images (B, channels, image_size, image_size) → logits (M, B, C) of each member; M = 1
        without an ensemble."""
        expected = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, expected))}), got "
                f"{tuple(images.shape)}"
            )
        x_BND = rearrange(self.stem(images), "b d h w -> b (h w) d")
        if self.cls is not None:
            x_BND = torch.cat([self.cls.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        x_BND = x_BND + self.pos_embedding

        for i, block in enumerate(self.blocks):
            if i == self.first_moe:
                x_BND = x_BND.repeat(self.ensemble_size, 1, 1)  # member after member
            x_BND = block(x_BND)

        x_BND = self.norm(x_BND)
        pooled_BD = self._pooled(x_BND)
        if self.pre_logits is not None:
            pooled_BD = self.pre_logits(pooled_BD).tanh()
        return rearrange(self.head(pooled_BD), "(m b) c -> m b c", m=self.ensemble_size)

    def _pooled(self, x_BND: Tensor) -> Tensor:
        if self.pool is not None:
            return self.pool(x_BND)
        return x_BND.mean(1) if self.cls is None else x_BND[:, 0]


def _conv_stem(channels: int, dim: int, patch_size: int) -> nn.Sequential:
    """Stride-2 3×3 convolutions down to the patch grid, GELU between them; widths double up to
    ``dim``."""
    steps = int(math.log2(patch_size))
    widths = [channels, *(max(8, dim >> (steps - 1 - i)) for i in range(steps - 1)), dim]
    layers: list[nn.Module] = []
    for i in range(steps):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _check_sizes(
    image_size: int,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    *,
    stem: str,
    classifier: str,
) -> None:
    """ValueError that names the size or the kind which does not fit."""
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {STEMS}, got {stem!r}")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {CLASSIFIERS}, got {classifier!r}")
    if min(image_size, patch_size, dim, depth, heads) < 1:
        raise ValueError(
            f"sizes must be at least 1, got {image_size=}, {patch_size=}, {dim=}, {depth=}, "
            f"{heads=}"
        )
    if dim % heads:
        raise ValueError(f"heads must divide dim = {dim}, got {heads}")
    if stem == "patch" and image_size % patch_size:
        raise ValueError(
            f"patch_size must divide image_size = {image_size} with the patch stem, got "
            f"{patch_size}"
        )
    if stem == "conv" and (patch_size < 2 or patch_size & (patch_size - 1)):
        raise ValueError(
            f"patch_size must be a power of two, 2 or more, with the conv stem, got {patch_size}"
        )
