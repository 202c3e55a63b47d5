"""The arrays of the official JAX V-MoE and ViT code, each as a part of this library's parameters.

Flax stores kernels as (in, out), attention kernels with an axis of heads, and convolutions channels
last. Every array (leaf) is named here once, with the einops pattern that takes this library's
layout to theirs. This file does not know ``VMoE``.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE
from ironmoe.moe.routers.ensemble import EnsembleRouter
from ironmoe.moe.vit.attention import Attention, AttentionPool, Block
from ironmoe.moe.vit.jax_leaf import Leaf


class VisionTransformer(Protocol):
    """What this file reads of a ``VMoE``, by the names of its attributes."""

    pos_embedding: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    @property
    def head(self) -> nn.Linear: ...

    @property
    def stem(self) -> nn.Module: ...

    @property
    def cls(self) -> nn.Parameter | None: ...

    @property
    def pool(self) -> AttentionPool | None: ...

    @property
    def pre_logits(self) -> nn.Linear | None: ...

    def eval(self) -> Any: ...


def leaves_of(model: VisionTransformer) -> Iterator[Leaf]:
    """Every array of the model's checkpoint. ValueError for a model that the official code cannot
    build."""
    if not isinstance(model.stem, nn.Conv2d):
        raise ValueError("the official code has no conv stem; the model must have stem='patch'")
    yield Leaf("embedding/kernel", model.stem.weight, "d c p q -> p q c d")
    yield _same("embedding/bias", model.stem.bias)
    if model.cls is not None:
        yield _same("cls", model.cls)
    yield _same("Encoder/posembed_input/pos_embedding", model.pos_embedding)

    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"Encoder/encoderblock_{i}"
        yield from _norm(f"{prefix}/LayerNorm_0", block.norm1)
        yield from _attention(f"{prefix}/SelfAttention", block.attn)
        yield from _norm(f"{prefix}/LayerNorm_1", block.norm2)
        if isinstance(block.mlp, Mlp):
            yield from _mlp(f"{prefix}/Mlp", block.mlp)
        else:
            yield from _moe(f"{prefix}/Moe", block.mlp)

    yield from _norm("Encoder/encoder_norm", model.norm)
    if model.pool is not None:
        pool = model.pool
        attention = "MapHead/MultiHeadDotProductAttention"
        yield _same("MapHead/probe", pool.probe)
        yield from _heads_in(attention, ("query",), pool.q, pool.heads)
        yield from _heads_in(attention, ("key", "value"), pool.kv, pool.heads)
        yield from _heads_out(attention, pool.proj, pool.heads)
        yield from _norm("MapHead/LayerNorm", pool.norm)
        yield from _mlp("MapHead/Mlp", pool.mlp)
    if model.pre_logits is not None:
        yield from _linear("pre_logits", model.pre_logits)
    yield from _linear("head", model.head)


def _moe(prefix: str, layer: nn.Module) -> Iterator[Leaf]:
    if isinstance(layer, SoftMoE):
        yield Leaf(f"{prefix}/Router/mu", layer.phi, "e p d -> d e p")
        yield Leaf(f"{prefix}/Router/scale", layer.scale, "1 ->")
    elif (
        isinstance(layer, MoE)
        and layer.shared is None
        and getattr(layer.router, "bias", None) is None
    ):
        router = layer.router
        if isinstance(router, EnsembleRouter):
            kernel = f"{prefix}/Router/dense/kernel"
            members = {"m": router.ensemble_size}
            yield Leaf(kernel, router.weight, "(m e) d -> d m e", members)
        else:
            weight: Any = router.weight
            yield Leaf(f"{prefix}/Router/dense/kernel", weight, "e d -> d e")
    else:
        raise ValueError(
            f"the official code has no {type(layer).__name__} like this at {prefix}: {layer}"
        )

    for name, experts in (("Dense_0", layer.fc1), ("Dense_1", layer.fc2)):
        yield Leaf(f"{prefix}/Mlp/{name}/kernel", experts.weight, "e o i -> e i o")
        yield _same(f"{prefix}/Mlp/{name}/bias", experts.bias)


def _attention(prefix: str, attention: Attention) -> Iterator[Leaf]:
    yield from _heads_in(prefix, ("query", "key", "value"), attention.qkv, attention.heads)
    yield from _heads_out(prefix, attention.proj, attention.heads)


def _heads_in(prefix: str, names: tuple[str, ...], linear: nn.Linear, heads: int) -> Iterator[Leaf]:
    """Several projections, which this library stacks in one ``nn.Linear``."""
    width = linear.weight.shape[0] // len(names)
    for number, name in enumerate(names):
        rows = slice(number * width, (number + 1) * width)
        sizes = {"h": heads}
        yield Leaf(f"{prefix}/{name}/kernel", linear.weight, "(h e) d -> d h e", sizes, rows)
        yield Leaf(f"{prefix}/{name}/bias", linear.bias, "(h e) -> h e", sizes, rows)


def _heads_out(prefix: str, linear: nn.Linear, heads: int) -> Iterator[Leaf]:
    yield Leaf(f"{prefix}/out/kernel", linear.weight, "d (h e) -> h e d", {"h": heads})
    yield _same(f"{prefix}/out/bias", linear.bias)


def _mlp(prefix: str, mlp: Mlp) -> Iterator[Leaf]:
    yield from _linear(f"{prefix}/Dense_0", mlp.fc1)
    yield from _linear(f"{prefix}/Dense_1", mlp.fc2)


def _linear(prefix: str, linear: nn.Linear) -> Iterator[Leaf]:
    yield Leaf(f"{prefix}/kernel", linear.weight, "o i -> i o")
    yield _same(f"{prefix}/bias", linear.bias)


def _norm(prefix: str, norm: nn.LayerNorm) -> Iterator[Leaf]:
    yield _same(f"{prefix}/scale", norm.weight)
    yield _same(f"{prefix}/bias", norm.bias)


def _same(name: str, tensor: Tensor | None) -> Leaf:
    """An array that has one layout in both libraries."""
    assert tensor is not None
    return Leaf(name, tensor, "... -> ...")
