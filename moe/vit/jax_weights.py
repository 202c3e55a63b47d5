"""Weights of the official JAX V-MoE and ViT code, into a ``VMoE`` and back.

Flax stores kernels as (in, out), attention kernels with an axis of heads, and convolutions channels
last; every leaf is named here once, with the einops pattern that takes this library's layout to
theirs. This file does not know ``VMoE``: its methods hand the class or the model in.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE
from ironmoe.moe.routers.ensemble import EnsembleRouter
from ironmoe.moe.vit.attention import Attention, AttentionPool, Block

OLD_NAMES = (  # of vit_jax, over the years → of V-MoE
    (r"^Transformer/", "Encoder/"),
    (r"(encoderblock_\d+)/MultiHeadDotProductAttention_\d+/", r"\1/SelfAttention/"),
    (r"(encoderblock_\d+)/MlpBlock_\d+/", r"\1/Mlp/"),
    (r"(encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
)


class VisionTransformer(Protocol):
    """What this file reads of a ``VMoE``, by the names of its attributes."""

    image_size: int
    pos_embedding: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Linear

    @property
    def stem(self) -> nn.Module: ...

    @property
    def cls(self) -> nn.Parameter | None: ...

    @property
    def pool(self) -> AttentionPool | None: ...

    @property
    def pre_logits(self) -> nn.Linear | None: ...

    def resize(self, image_size: int) -> Any: ...


Model = TypeVar("Model", bound=VisionTransformer)


class Leaf(NamedTuple):
    """One array of a checkpoint: its name, the view of a parameter that holds it, and the pattern
    from view to array."""

    name: str
    view: Tensor
    pattern: str
    sizes: Mapping[str, int] = MappingProxyType({})

    def to_array(self) -> Tensor:
        return rearrange(self.view, self.pattern, **self.sizes)

    def copy_from(self, array: Tensor) -> None:
        ours, theirs = self.pattern.split("->")
        self.view.copy_(rearrange(array, f"{theirs} -> {ours}", **self.sizes))


def from_jax(
    cls: Callable[..., Model],
    params: Mapping[str, np.ndarray],
    *,
    image_size: int | None = None,
    heads: int | None = None,
    top_k: int | None = None,
    **options: Any,
) -> Model:
    """The model of an official checkpoint, in eval mode. Everything the arrays tell is read from
    them.

    The official code works on images (B, H, W, 3) in [−1, 1]; this model on (B, 3, H, W).

    Args:
        cls: ``VMoE``.
        params: names to arrays, as ``read_vmoe_checkpoint`` and ``read_npz_checkpoint`` give them.
        image_size: in pixels; if it is not the checkpoint's, the position embeddings are resized.
        heads: checked if given.
        top_k: K, which no array tells; needed for a model with top-k routers.
        options: other arguments of ``VMoE``. For the same function as the official configurations:
            ``capacity=Capacity(factor, images_per_group=group_size / tokens)``,
            ``dispatch_dtype=torch.bfloat16``.

    Raises:
        ValueError: arrays are missing, left over, or of the wrong shape; it names them.
    """
    params = _official_names(params)
    shape = _Shapes(params)
    patch, _, channels, dim = shape("embedding/kernel", 4)
    _, depth_heads, _ = shape("Encoder/encoderblock_0/SelfAttention/query/kernel", 3)
    if heads not in (None, depth_heads):
        raise ValueError(f"heads must be {depth_heads}, as the checkpoint has them, got {heads}")
    blocks = [
        int(match[1])
        for name in params
        if (match := re.match(r"Encoder/encoderblock_(\d+)/", name))
    ]
    moe_layers = sorted(
        {i for i in blocks if f"Encoder/encoderblock_{i}/Moe/Mlp/Dense_0/kernel" in params}
    )
    dense = [i for i in blocks if i not in moe_layers]
    tokens = shape("Encoder/posembed_input/pos_embedding", 3)[1] - ("cls" in params)
    settings: dict[str, Any] = {
        "image_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "channels": channels,
        "dim": dim,
        "heads": depth_heads,
        "depth": max(blocks) + 1,
        "num_classes": shape("head/kernel", 2)[1],
        "moe_layers": moe_layers,
        "classifier": "token" if "cls" in params else "map" if "MapHead/probe" in params else "gap",
        "representation_size": shape("pre_logits/kernel", 2)[1]
        if "pre_logits/kernel" in params
        else None,
    }
    if dense:
        settings["mlp_dim"] = shape(f"Encoder/encoderblock_{dense[0]}/Mlp/Dense_0/kernel", 2)[1]
    if moe_layers:
        settings |= _moe_settings(shape, moe_layers[0], top_k, options)
        settings.setdefault("mlp_dim", settings["expert_dim"])
    elif top_k is not None:
        raise ValueError(f"top_k must be None for a checkpoint without experts, got {top_k}")
    model = cls(**settings | options)
    _fill(model, params)
    model.resize(image_size or model.image_size).eval()
    return model


def to_jax(model: VisionTransformer) -> dict[str, np.ndarray]:
    """Names to float32 arrays, as the official V-MoE code names and shapes them: what
    ``write_vmoe_checkpoint`` takes."""
    return {
        leaf.name: leaf.to_array().detach().float().cpu().numpy().copy() for leaf in _leaves(model)
    }


def _moe_settings(
    shape: "_Shapes", block: int, top_k: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    prefix = f"Encoder/encoderblock_{block}/Moe"
    num_experts, dim, expert_dim = shape(f"{prefix}/Mlp/Dense_0/kernel", 3)
    settings: dict[str, Any] = {"num_experts": num_experts, "expert_dim": expert_dim}
    if f"{prefix}/Router/mu" in shape.params:
        slots = shape(f"{prefix}/Router/mu", 3)[2]
        soft = {"activation": "gelu_tanh", "dispatch_dtype": options.pop("dispatch_dtype", None)}
        return settings | {
            "make_moe": partial(SoftMoE, dim, expert_dim, num_experts, slots, **soft)
        }
    if "make_moe" not in options and top_k is None:
        raise ValueError(
            f"top_k must be given for a checkpoint with {num_experts} experts: no array tells it"
        )
    router = shape.params.get(f"{prefix}/Router/dense/kernel")
    members = router.shape[1] if router is not None and router.ndim == 3 else 1
    return settings | {"top_k": top_k or 1, "ensemble_size": members}


def _fill(model: VisionTransformer, params: Mapping[str, np.ndarray]) -> None:
    leaves = list(_leaves(model))
    missing = [leaf.name for leaf in leaves if leaf.name not in params]
    unused = sorted(set(params) - {leaf.name for leaf in leaves})
    if missing or unused:
        raise ValueError(
            f"params must hold the arrays of one model; missing: {_some(missing)}; not known: "
            f"{_some(unused)}"
        )
    with torch.no_grad():
        for leaf in leaves:
            array, expected = np.asarray(params[leaf.name]), tuple(leaf.to_array().shape)
            if array.shape != expected:
                raise ValueError(
                    f"params[{leaf.name!r}] must have shape {expected}, got {array.shape}"
                )
            leaf.copy_from(torch.from_numpy(np.array(array, dtype=np.float32)))


def _leaves(model: VisionTransformer) -> Iterator[Leaf]:
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
        yield from (
            _mlp(f"{prefix}/Mlp", block.mlp)
            if isinstance(block.mlp, Mlp)
            else _moe(f"{prefix}/Moe", block.mlp)
        )
    yield from _norm("Encoder/encoder_norm", model.norm)
    if model.pool is not None:
        pool, attention, heads = (
            model.pool,
            "MapHead/MultiHeadDotProductAttention",
            model.pool.heads,
        )
        yield _same("MapHead/probe", pool.probe)
        yield from _heads_in(attention, ("query",), pool.q, heads)
        yield from _heads_in(attention, ("key", "value"), pool.kv, heads)
        yield from _heads_out(attention, pool.proj, heads)
        yield from _norm("MapHead/LayerNorm", pool.norm)
        yield from _mlp("MapHead/Mlp", pool.mlp)
    if model.pre_logits is not None:
        yield from _linear("pre_logits", model.pre_logits)
    yield from _linear("head", model.head)


def _moe(prefix: str, layer: nn.Module) -> Iterator[Leaf]:
    if isinstance(layer, SoftMoE):
        yield Leaf(f"{prefix}/Router/mu", layer.phi, "e p d -> d e p")
        yield _same(f"{prefix}/Router/scale", layer.scale)
    elif (
        isinstance(layer, MoE)
        and layer.shared is None
        and getattr(layer.router, "bias", None) is None
    ):
        router = layer.router
        if isinstance(router, EnsembleRouter):
            yield Leaf(
                f"{prefix}/Router/dense/kernel",
                router.weight,
                "(m e) d -> d m e",
                {"m": router.ensemble_size},
            )
        else:
            yield Leaf(f"{prefix}/Router/dense/kernel", router.weight, "e d -> d e")  # type: ignore[arg-type]
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
    """Several projections that this library stacks in one."""
    for name, weight, bias in zip(
        names, linear.weight.chunk(len(names)), linear.bias.chunk(len(names)), strict=True
    ):
        yield Leaf(f"{prefix}/{name}/kernel", weight, "(h e) d -> d h e", {"h": heads})
        yield Leaf(f"{prefix}/{name}/bias", bias, "(h e) -> h e", {"h": heads})


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
    assert tensor is not None
    return Leaf(name, tensor, "... -> ...")


class _Shapes:
    """Shapes of the arrays, by name and number of axes."""

    def __init__(self, params: Mapping[str, np.ndarray]) -> None:
        self.params = params

    def __call__(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.params:
            raise ValueError(
                f"params must hold {name!r} like every checkpoint of ViT or V-MoE, got "
                f"{_some(sorted(self.params))}"
            )
        shape = np.shape(self.params[name])
        if len(shape) != axes:
            raise ValueError(f"params[{name!r}] must have {axes} axes, got shape {shape}")
        return shape


def _official_names(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in params.items():
        for old, new in OLD_NAMES:
            name = re.sub(old, new, name)
        renamed[name] = array
    return renamed


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    ) or "none"
