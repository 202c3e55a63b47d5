"""A layer of experts behind the constructor of timm's Mlp, for ``mlp_layer=``.

This file does not know ``MoE``: ``MoE.as_mlp_layer`` hands its class in.
"""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import torch
from torch import nn

from ironmoe.kernels.activations import ACTIVATIONS
from ironmoe.moe.layers.dense_mlp import activation_name
from ironmoe.moe.routers.top_k import TopKRouter, router_options


class MoEMlp(nn.Module):
    """The arguments of timm's Mlp, turned into those of ``MoE``, the next of the base classes.
    ``as_mlp_layer`` puts the two together.

    Args:
        in_features: D; hidden_features: F of each expert, by default D; out_features: None or D.
        act_layer: makes a module that computes an activation in ``ironmoe.kernels.ACTIVATIONS``.
        norm_layer, drop, use_conv: only None, 0 and False.
        bias: whether the experts have biases.
        num_experts: E; top_k: K; activation: a name in ``ACTIVATIONS`` in place of ``act_layer``.
        router: keyword arguments of ``TopKRouter``; moe_options: further keyword arguments of
            ``MoE``.

    Raises:
        ValueError: an argument outside the values above.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        *,
        num_experts: int,
        top_k: int = 2,
        activation: str | None = None,
        router: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **moe_options: Any,
    ) -> None:
        if out_features not in (None, in_features):
            raise ValueError(
                f"out_features must be None or in_features = {in_features}, got {out_features}"
            )
        if norm_layer is not None:
            raise ValueError(
                "norm_layer must be None, because experts have no norm between their layers, got "
                f"{norm_layer}"
            )
        if drop not in (0, (0, 0)):
            raise ValueError(
                f"drop must be 0, because experts have no dropout, got {drop}: put an nn.Dropout "
                "behind the layer in its place"
            )
        if use_conv:
            raise ValueError(
                "use_conv must be False: experts take tokens on the last axis, not NCHW images"
            )
        if bias not in (True, False, (True, True), (False, False)):
            raise ValueError(f"bias must be the same for both layers, got {bias}")
        if activation is None:
            act = act_layer()
            activation = activation_name(act)
            if activation is None:
                known = [name for name, entry in ACTIVATIONS.items() if not entry.gated]
                raise ValueError(f"act_layer must make one of {', '.join(known)}, got {act}")
        super().__init__(
            in_features,
            hidden_features or in_features,
            num_experts,
            top_k,
            activation=activation,
            bias=bias in (True, (True, True)),
            router=TopKRouter(
                in_features,
                num_experts,
                top_k,
                device=device,
                dtype=dtype,
                **router_options(router),
            ),
            device=device,
            dtype=dtype,
            **moe_options,
        )


def as_mlp_layer(
    cls: type[nn.Module], num_experts: int, top_k: int = 2, **moe_options: Any
) -> type[Any]:
    """The class that timm takes as ``mlp_layer``: called with the arguments of timm's Mlp, it makes
    a ``cls``.

    Layers made with it can be copied and pickled. Every block of the timm model then has experts;
    for some of them only, see ``upcycle``.

    Args:
        cls: ``MoE``.
        num_experts: E; top_k: K.
        moe_options: ``activation``, ``router`` and those of ``MoE``, see ``MoEMlp``.

    Raises:
        ValueError, TypeError: as ``MoEMlp`` and ``MoE``, at once and not only when a model is
            built.
    """
    options = {"num_experts": num_experts, "top_k": top_k, **moe_options}

    # A class made in a function cannot be found by its name, so a pickle makes it again.
    def __reduce__(self: nn.Module) -> tuple[Any, ...]:
        return _new, (cls, options), vars(self)

    body = {"__init__": partialmethod(MoEMlp.__init__, **options), "__reduce__": __reduce__}
    layer = type(MoEMlp.__name__, (MoEMlp, cls), body)
    layer(in_features=1, device="meta")
    return layer


def _new(cls: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    layer = as_mlp_layer(cls, **options)
    return nn.Module.__new__(layer)
