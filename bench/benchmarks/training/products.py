"""What a training step computes: FLOPs of its matrix products, by what each product is for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
COPIES = (aten._to_copy, aten.clone, aten.copy_)
# torch's fused attention on CPU has no formula in flop_registry; see ``count_products``
CONVOLUTION_BACKWARD = aten.convolution_backward
IMAGE, WEIGHT = (True, False, False), (False, True, False)


class Products(NamedTuple):
    """FLOPs of matrix products. forward: of forward passes; image: of gradients that lead to the
    image; weight: of gradients of weights. With ``per``, the same in forward passes."""

    forward: float
    image: float
    weight: float

    def per(self, one_forward_pass: float) -> "Products":
        return Products(*(flops / one_forward_pass for flops in self))


class _Counter(TorchDispatchMode):
    """Adds up FLOPs of products while it is active.

    A product of a backward pass belongs to an image gradient if one of its factors is a weight, and
    to a weight gradient if none is. A weight that autocast has cast is still a weight.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.flops = {"forward": 0.0, "image": 0.0, "weight": 0.0}
        self._weights = {_storage(weight) for weight in weights}
        self._kept: list[Tensor] = []  # a storage that was freed could be given to another tensor

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func.overloadpacket
        has_weight = any(
            _storage(t) in self._weights for t in tree_leaves((args, kwargs)) if _is_dense(t)
        )

        if operator in COPIES and has_weight:
            self._weights.add(_storage(out))
            self._kept.append(out)
        elif operator in flop_registry:
            self._add(operator, args, kwargs, out, has_weight)
        return out

    def _add(
        self,
        operator: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        has_weight: bool,
    ) -> None:
        count = flop_registry[operator]
        if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
            self.flops["forward"] += count(*args, **kwargs, out_val=out)
        elif operator is CONVOLUTION_BACKWARD:
            *others, wanted = args
            for kind, mask in {"image": IMAGE, "weight": WEIGHT}.items():
                if wanted[mask.index(True)]:
                    self.flops[kind] += count(*others, mask, **kwargs, out_val=out)
        else:
            self.flops["image" if has_weight else "weight"] += count(*args, **kwargs, out_val=out)


def count_products(model: nn.Module, step: Callable[[], object]) -> Products:
    """The products that ``step`` computes with the weights of ``model``.

    Products of attention have no weight, and the fused attention of a CPU hides them; they are left
    out. They have the same share in every step that is compared here.
    """
    counter = _Counter(list(model.parameters()))
    with counter:
        step()
    return Products(**counter.flops)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
