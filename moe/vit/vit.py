"""Vision transformers, dense and with experts: one class, ``VMoE``."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.kernels.autograd.softmax import log_softmax, logsumexp
from ironmoe.kernels.checks import check_counts, check_floats
from ironmoe.moe.layers.layer_norm import LayerNorm
from ironmoe.moe.layers.linear import XavierLinear, ZeroLinear
from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.capacity import Capacity
from ironmoe.moe.routers.ensemble import EnsembleRouter
from ironmoe.moe.routers.masks import mean_over_tokens, zero_padding
from ironmoe.moe.routers.top_k import TopKRouter, router_options
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.vit.attention import LAYER_NORM_EPS, AttentionPool, Block
from ironmoe.moe.vit.configs import from_config
from ironmoe.moe.vit.jax_weights import from_jax, load_jax, to_jax
from ironmoe.moe.vit.placement import placement
from ironmoe.moe.vit.positions import resize_positions
from ironmoe.moe.vit.sizes import check_sizes
from ironmoe.moe.vit.stem import ConvStem, clear_pixels, over_patches


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
        router: keyword arguments of ``TopKRouter``, such as ``{"renormalize": True}``; a router of
            your own belongs into ``make_moe``.
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
        TypeError: a size that is no whole number, a router that is no dict.
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
        check_sizes(image_size, patch_size, dim, depth, heads, stem=stem, classifier=classifier)
        check_counts(mlp_dim=mlp_dim, num_classes=num_classes, channels=channels)
        for name, width in {
            "expert_dim": expert_dim,
            "representation_size": representation_size,
        }.items():
            if width is not None:
                check_counts(**{name: width})
        moe_layers = placement(moe_layers, depth, "moe_layers")
        if ensemble_size < 1 or (ensemble_size > 1 and not moe_layers):
            raise ValueError(
                f"ensemble_size must be at least 1, and 1 without moe_layers, got {ensemble_size}"
            )
        route_options = router_options(router)
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels
        self.num_classes = num_classes
        self.classifier = classifier
        self.head_bias = head_bias
        self.ensemble_size = ensemble_size
        self.first_moe = min(moe_layers, default=depth)

        if stem == "conv":
            self.stem: nn.Module = ConvStem(channels, dim, patch_size)
        else:
            self.stem = nn.Conv2d(channels, dim, patch_size, patch_size)
        num_tokens = math.ceil(image_size / patch_size) ** 2
        self.cls = nn.Parameter(torch.empty(1, 1, dim)) if classifier == "token" else None
        self.pos_embedding = nn.Parameter(torch.empty(1, num_tokens + (self.cls is not None), dim))

        def moe() -> nn.Module:
            if make_moe is not None:
                return make_moe()
            if ensemble_size > 1:
                route: nn.Module = EnsembleRouter(
                    dim, num_experts, top_k, ensemble_size=ensemble_size, **route_options
                )
            else:
                route = TopKRouter(dim, num_experts, top_k, **route_options)
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
        self.norm: nn.LayerNorm = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.pool = AttentionPool(dim, heads, mlp_dim) if classifier == "map" else None
        self.pre_logits = XavierLinear(dim, representation_size) if representation_size else None
        self.head = ZeroLinear(representation_size or dim, num_classes, initial_bias=head_bias)
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

    def load_jax(self, params: Mapping[str, np.ndarray]) -> None:
        """Set the weights, sharded or not, to those of an official checkpoint:
        ``ironmoe.moe.vit.jax_weights.load_jax``."""
        load_jax(self, params)

    def to_jax(self) -> dict[str, np.ndarray]:
        """The weights by their official names and in their official layout:
        ``ironmoe.moe.vit.jax_weights.to_jax``."""
        return to_jax(self)

    def reset_parameters(self) -> None:
        """The class token 0, the positions N(0, 0.02²); every layer resets itself.

        For a whole model, for example one whose memory ``to_empty`` made, call the method of each
        of ``model.modules()`` that has one, in any order. Together these are the official code's
        initial values: Xavier uniform weights, zero biases, a zero head.
        """
        if self.cls is not None:
            nn.init.zeros_(self.cls)
        nn.init.normal_(self.pos_embedding, std=0.02)

    @torch.no_grad()
    def resize(self, image_size: int) -> "VMoE":
        """Take images of another size from now on; returns the model.

        The position embeddings are interpolated linearly over the grid, and corners stay corners:
        the official code does so between resolutions (224 → 384). The embedding of the class token
        stays as it is.
        """
        kinds = {"stem": self._stem_kind, "classifier": self.classifier}
        check_sizes(image_size, self.patch_size, dim=1, depth=1, heads=1, **kinds)
        side = math.ceil(image_size / self.patch_size)
        resized = resize_positions(self.pos_embedding, side, has_token=self.cls is not None)
        self.pos_embedding = nn.Parameter(resized, requires_grad=self.pos_embedding.requires_grad)
        self.image_size = image_size
        return self

    @property
    def _stem_kind(self) -> str:
        return "patch" if isinstance(self.stem, nn.Conv2d) else "conv"

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, channels, image_size, image_size) → logits (B, C); of an ensemble,
        log-probabilities.

        Args:
            mask: over the patches, (B, N) row after row or (B, h, w); bool, or 0 and 1. False marks
                padding, as ``pad_images`` makes it. An image gets the logits that its real patches
                have alone, at their positions, whatever the padding holds. A conv stem takes
                padding for what lies beyond the border. Without a real patch logits are finite.

        Raises:
            ValueError: images or mask has the wrong shape, or the mask the wrong dtype.
            TypeError: images are no float tensor.
        """
        if self.ensemble_size == 1:
            return self._logits(images, mask)
        logits_MBC = self.member_logits(images, mask)
        return logsumexp(log_softmax(logits_MBC, -1), 0) - math.log(self.ensemble_size)

    def member_logits(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, channels, image_size, image_size) → logits (M, B, C) of each member; M = 1
        without an ensemble. ``mask`` as in ``forward``."""
        return rearrange(self._logits(images, mask), "(m b) c -> m b c", m=self.ensemble_size)

    def _logits(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """(M · B, C), member after member."""
        expected = (self.channels, self.image_size, self.image_size)
        check_floats(images, f"(B, {', '.join(map(str, expected))})", "images")
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, expected))}), got "
                f"{tuple(images.shape)}"
            )
        masks: list[Tensor] = []  # none or one
        if mask is None:
            x_BND = self._tokens(self.stem(images))
        else:
            x_BND, mask_BN = self._real_tokens(images, mask)
            masks.append(mask_BN)

        for i, block in enumerate(self.blocks):
            if i == self.first_moe:  # member after member
                x_BND = x_BND.repeat(self.ensemble_size, 1, 1)
                masks = [mask_BN.repeat(self.ensemble_size, 1) for mask_BN in masks]
            x_BND = block(x_BND, *masks)

        pooled_BD = self._pooled(self.norm(x_BND), *masks)
        if self.pre_logits is not None:
            pooled_BD = self.pre_logits(pooled_BD).tanh()
        return self.head(pooled_BD)

    def _tokens(self, patches: Tensor) -> Tensor:
        """patches (B, D, h, w) → (B, N, D) with the class token and positions."""
        x_BND = rearrange(patches, "b d h w -> b (h w) d")
        if self.cls is not None:
            x_BND = torch.cat([self.cls.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        return x_BND + self.pos_embedding

    def _real_tokens(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D), 0 in padding, and their mask (B, N), in which a class token is real."""
        batch, side = images.shape[0], math.ceil(self.image_size / self.patch_size)
        mask_Bhw = over_patches(mask, batch, side)
        if isinstance(unwrapped(self.stem), ConvStem):
            patches = self.stem(images, mask_Bhw)
        else:
            patches = self.stem(clear_pixels(images, mask_Bhw, self.patch_size))
        x_BND, mask_BN = self._tokens(patches), mask_Bhw.flatten(1)
        if self.cls is not None:
            mask_BN = torch.cat([mask_BN.new_ones(batch, 1), mask_BN], dim=1)
        return zero_padding(x_BND, mask_BN), mask_BN

    def _pooled(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        if self.pool is not None:
            return self.pool(x_BND, mask_BN)
        if self.cls is not None:
            return x_BND[:, 0]
        if mask_BN is None:
            return x_BND.mean(1)
        # bfloat16 cannot count beyond 256
        wide = torch.promote_types(x_BND.dtype, torch.float32)
        return mean_over_tokens(x_BND.to(wide), mask_BN).to(x_BND.dtype)
