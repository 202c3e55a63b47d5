"""Whole models whose memory is computed. Their parameters are counted on the meta device, which
holds no numbers."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ironmoe.bench.benchmarks.scale.layers import DEEPSEEK, LAYERS, Layer
from ironmoe.bench.benchmarks.shapes import Shape
from ironmoe.moe import MoE, VMoE

JFT_300M, JFT_3B = 18_291, 29_593  # classes, by which the papers' heads are as large


class Model(NamedTuple):
    """name: for people; build: makes it; tokens: of one rank, in one pass."""

    name: str
    build: Callable[[], nn.Module]
    tokens: int


class Counted(NamedTuple):
    """experts, rest: numbers of parameters in routed experts, and of all others; layer: the MoE
    layer, with how many of it there are."""

    experts: int
    rest: int
    layer: Layer

    @property
    def total(self) -> int:
        return self.experts + self.rest


@cache
def counted(model: Model) -> Counted:
    """Its parameters, and its MoE layers, which must be of one size."""
    with torch.device("meta"):
        built = model.build()
    moes = [module for module in built.modules() if isinstance(module, MoE)]
    experts = sum(p.numel() for moe in moes for fc in (moe.fc1, moe.fc2) for p in fc.parameters())
    rest = sum(parameter.numel() for parameter in built.parameters()) - experts

    layer = _layer_of(moes[0], model)
    assert all(_layer_of(moe, model) == layer for moe in moes)
    return Counted(experts, rest, layer._replace(repeats=len(moes)))


def layer_alone(layer: Layer) -> Model:
    """A model that is one layer with its router."""
    return Model(layer.shape.name, partial(_moe, layer), layer.shape.tokens)


def _moe(layer: Layer) -> MoE:
    _, dim, hidden, num_experts, top_k = layer.shape.sizes
    return MoE(
        dim,
        hidden,
        num_experts,
        top_k,
        activation=layer.shape.activation,
        bias=layer.shape.bias,
        shared_dim=layer.shared,
    )


def _layer_of(moe: MoE, model: Model) -> Layer:
    router: Any = moe.router
    shape = Shape(
        model.name,
        model.tokens,
        moe.dim,
        moe.fc2.in_features,
        moe.num_experts,
        router.top_k,
        activation=moe.activation,
        bias=moe.fc1.bias is not None,
    )
    return Layer(shape, shared=0 if moe.shared is None else moe.shared.fc2.in_features)


def _vmoe(size: str, moe_layers: str) -> Callable[[], nn.Module]:
    return partial(
        VMoE.from_config,
        f"V-MoE-{size}",
        num_experts=32,
        moe_layers=moe_layers,
        num_classes=JFT_300M,
    )


def _v_moe_15b() -> nn.Module:
    """The largest model of arXiv 2106.05974: 48 blocks, without the layer before the head."""
    return VMoE(
        224, 14, 1408, 48, 16, 6400, JFT_3B, "every 2", num_experts=32, representation_size=None
    )


_L16, _H14 = (layer.shape.tokens for layer in LAYERS[:2])
MODELS = (
    Model("V-MoE-L/16, last 2", _vmoe("L/16", "last 2"), _L16),
    Model("V-MoE-L/16, every 2", _vmoe("L/16", "every 2"), _L16),
    Model("V-MoE-H/14, last 5", _vmoe("H/14", "last 5"), _H14),
    Model("V-MoE-H/14, every 2", _vmoe("H/14", "every 2"), _H14),
    Model("V-MoE-15B, every 2", _v_moe_15b, _H14),
    layer_alone(DEEPSEEK)._replace(name="DeepSeek-V3, one layer"),
)
