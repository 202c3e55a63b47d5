"""The stacked weights of one layer of all experts, and how an operation reaches them.

Shape suffixes: T tokens, D their width, E experts, N outputs of an expert.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ironmoe.kernels import Dispatch, Routing

# (x, w_in, b_in, w_out, b_out) → y
TwoLayers = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


# (routing, the plan of its rows where there is one already) → their product with these weights
ProductOf = Callable[[Routing, Dispatch | None], TwoLayers]
# (the products of a layer, the routing, its plan) → what runs while the experts are offloaded
Offloaded = Callable[[ProductOf, Routing, Dispatch | None], TwoLayers]


class ExpertLinear(nn.Module):
    """The stacked weights of one layer of all experts: ``weight`` (E, N, D) and ``bias`` (E, N),
    each as nn.Linear's.

    One product often needs the weights of two such layers, so ``forward`` runs an operation of the
    caller with its own weights. Whatever acts around a call of a module, acts here, too: hooks,
    ``torch.nn.utils.prune``, weight and spectral norm, adapters of PEFT, offloading of accelerate,
    FSDP2. Code that reads ``weight`` from outside would pass all of these by.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert Xavier uniform on its own, bias 0: experts start different, so that they can
        specialise."""
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """What ``use(x, weight, bias)`` returns. The weights are valid while it runs: FSDP2 and
        offloading may take them away afterwards.

        Args:
            x: what the operation works on; wrappers may cast it or move it to another device.
            use: (x, weight (E, N, D), bias (E, N) or None) → Tensor.
        """
        return use(x, self.weight, self.bias)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first on every module of a model."""
        raise RuntimeError(
            "torch.jit.script cannot compile experts, whose layers take functions: use "
            "torch.export.export(model, args)"
        )

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


def with_weights(fc1: nn.Module, fc2: nn.Module, x: Tensor, use: TwoLayers) -> Tensor:
    """What ``use(x, w_in, b_in, w_out, b_out)`` returns, with the weights of two ``ExpertLinear``
    or of wrappers around them."""

    def with_first(x: Tensor, w_in: Tensor, b_in: Tensor | None) -> Tensor:
        def with_both(x: Tensor, w_out: Tensor, b_out: Tensor | None) -> Tensor:
            return use(x, w_in, b_in, w_out, b_out)

        return fc2(x, with_both)

    return fc1(x, with_first)


def run_experts(
    layer: Any,
    x: Tensor,
    routing: Routing,
    dispatch: Dispatch | None,
    product_of: ProductOf,
) -> Tensor:
    """What the experts of a layer make of x: ``product_of(routing, dispatch)`` with all of their
    weights, or, while they are offloaded, with those of the experts that have rows.

    Args:
        layer: a module with ``fc1`` and ``fc2`` as in ``with_weights``, and ``offloaded``, which is
            None or an ``Offloaded``.
    """
    offloaded: Offloaded | None = layer.offloaded
    if offloaded is None:
        use = product_of(routing, dispatch)
    else:
        use = offloaded(product_of, routing, dispatch)
    return with_weights(layer.fc1, layer.fc2, x, use)
