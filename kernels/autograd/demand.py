"""Which gradients the running backward pass was asked for.

``ctx.needs_input_grad`` says what requires grad, not what this call wants: under
``torch.autograd.grad(loss, [x])`` it is true for the weights as well (pytorch/pytorch#174017). The
autograd engine knows it. It answers for a node of the graph but not for a leaf, so every input goes
through an alias first. ``torch.autograd.graph.register_multi_grad_hook`` asks the engine in the
same way.
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

    Call it inside ``backward``. ``is_tensor[i]`` says whether input i was a tensor; each tensor
    came from ``with_own_node``.
    """
    # next_functions has an entry for each tensor argument, and none for the others
    nodes = (node for node, _ in ctx.next_functions)
    wanted = []
    for given, needs in zip(is_tensor, ctx.needs_input_grad, strict=False):
        node = next(nodes) if given else None
        wanted.append(
            bool(
                needs
                and node is not None
                and (_is_leaf(node) or torch._C._will_engine_execute_node(node))
            )
        )
    return wanted


def _is_leaf(node: Any) -> bool:
    """Whether an operator was called on a leaf directly, which the engine cannot be asked about."""
    return node.name() == "torch::autograd::AccumulateGrad"
