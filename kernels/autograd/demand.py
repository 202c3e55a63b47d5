"""Which gradients the running backward pass was asked for.

``ctx.needs_input_grad`` says what requires grad, not what this call wants: under
``torch.autograd.grad(loss, [x])`` it is true for the weights as well (pytorch/pytorch#174017). The
autograd engine knows it. Of a leaf whose gradient ``torch.autograd.grad`` will return it answers by
an error, which takes time, so inputs that may be such leaves go through an alias first.
``torch.autograd.graph.register_multi_grad_hook`` asks the engine in the same way.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

_Given = TypeVar("_Given", Tensor, Tensor | None)


def with_own_node(tensor: _Given) -> _Given:
    """The same values behind a graph node of their own, where there is a graph."""
    return tensor.view_as(tensor) if tensor is not None and tensor.requires_grad else tensor


def demanded(ctx: Any, is_tensor: tuple[bool, ...]) -> list[bool]:
    """Says for each of the first inputs of a Function whether this backward pass will use its
    gradient.

    Call it inside ``backward``. ``is_tensor[i]`` says whether input i was a tensor.
    """
    # next_functions has an entry for each tensor argument, and none for the others
    nodes = (node for node, _ in ctx.next_functions)
    wanted = []
    for given, needs in zip(is_tensor, ctx.needs_input_grad, strict=False):
        node = next(nodes) if given else None
        wanted.append(bool(needs and node is not None and _runs(node)))
    return wanted


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is wanted
        return True
