"""The experts of one layer: all of them in host memory, those that have rows on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels.autograd.saved import saving
from ironmoe.kernels.route import autocast_dtype, transformed
from ironmoe.kernels.types import Dispatch, Routing
from ironmoe.moe.layers.expert_linear import ProductOf, TwoLayers
from ironmoe.moe.offload.numbering import experts_with_rows, renumbered
from ironmoe.moe.offload.resident import Host, ResidentExperts
from ironmoe.moe.offload.stacks import ExpertOffload, Stack


class _Handle(NamedTuple):
    """What autograd keeps of weights on the device: where they come from.

    which: index among the weights; experts: those in the view that was saved; size, stride, offset:
    of the view in a stack of these
    """

    which: int
    experts: tuple[int, ...]
    host: Host
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class OffloadedExperts:
    """Brings in the experts that a pass needs, and again what its backward pass reads.

    It stands in a layer as ``offloaded``. A copy or a pickle of the layer has None there: it is not
    offloaded.
    """

    def __init__(self, keep: int, offload: ExpertOffload) -> None:
        self.resident = ResidentExperts(keep, offload)

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(
        self, product_of: ProductOf, routing: Routing, dispatch: Dispatch | None
    ) -> TwoLayers:
        """What runs in place of ``product_of(routing, dispatch)`` (``run_experts``)."""

        def run(x: Tensor, *weights: Any) -> Tensor:
            _check_frozen(weights)
            num_experts = len(weights[0])
            host = Host.now(weights, autocast_dtype(x) or weights[0].dtype)
            if transformed():  # no value can be looked at, and no hook set
                every = ResidentExperts(0, self.resident.offload).having(range(num_experts), host)
                return product_of(routing, dispatch)(x, *every.weights)

            stack = self.resident.having(experts_with_rows(routing, dispatch, num_experts), host)
            product = product_of(*renumbered(routing, dispatch, stack.experts, num_experts))
            with saving(self._take(stack, host), self._give):
                y = product(x, *stack.weights)
            self.resident.retain(stack, host)
            return y

        return run

    def _take(self, stack: Stack, host: Host) -> Callable[[Tensor], _Handle | None]:
        """The function that makes handles of saved views of this stack. It does not keep the
        stack."""
        experts = stack.experts
        which_at = {
            weight.untyped_storage().data_ptr(): (which, weight.stride(0))
            for which, weight in enumerate(stack.weights)
            if weight is not None
        }

        def take(tensor: Tensor) -> _Handle | None:
            found = which_at.get(tensor.untyped_storage().data_ptr())
            if found is None or tensor.numel() == 0:
                return None
            which, size_of_one = found
            start = int(tensor.storage_offset())
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = start + sum((size - 1) * stride for size, stride in steps)
            first = start // size_of_one
            inside = experts[first : last // size_of_one + 1]
            offset = start - first * size_of_one
            return _Handle(which, inside, host, tensor.shape, tensor.stride(), offset)

        return take

    def _give(self, handle: _Handle) -> Tensor:
        host = handle.host
        if not host.same_as(Host.now(host.weights, host.dtype)):
            raise RuntimeError(
                "weights of offloaded experts are read again in the backward pass; one was "
                "modified in place after the forward pass"
            )
        weight = self.resident.again(handle.which, handle.experts, host)
        offset = weight.storage_offset() + handle.offset
        return weight.as_strided(handle.size, handle.stride, offset)


def _check_frozen(weights: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights):
        raise RuntimeError(
            "weights of offloaded experts must not require grad in a pass that records gradients, "
            "got one that does: its gradient would need all experts on the device"
        )
