"""``offload_experts``: a model whose experts stay in host memory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ironmoe.kernels.checks import check_counts, check_module
from ironmoe.moe.layers.expert_linear import ExpertLinear
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE
from ironmoe.moe.offload.layer import OffloadedExperts
from ironmoe.moe.offload.stacks import ExpertOffload
from ironmoe.moe.sharded import is_sharded

_Layers = dict[str, MoE | SoftMoE]

HOST = torch.device("cpu")


@contextmanager
def offload_experts(
    model: nn.Module, device: torch.device | str | None = None, *, keep: int = 0
) -> Iterator[ExpertOffload]:
    """Inside the block the experts of every ``MoE`` and ``SoftMoE`` lie in host memory, and a pass
    brings those that have tokens to the device, one layer after another. For attacks on models, and
    evaluation of models, that are larger than the device.

    Outputs and gradients of images, of any order, are those of the model without it, on CPU bit for
    bit. A backward pass brings experts in again, so that at its peak the device holds those of one
    layer, too. With ``create_graph=True`` the new graph holds the experts that it reads, until it
    is freed; under ``torch.func`` a layer brings in all of its experts, and its pullback holds
    them.

    Inside the block the weights of experts are frozen, all others are on the device, ``state_dict``
    has all weights under their names, and torch.compile stands aside. A pass waits once a layer for
    the device, to learn which experts have tokens. Afterwards, also after an exception, weights are
    where they were and require grad as they did; if they were in host memory before, it stays
    pinned.

    Args:
        model: changed in place. A copy or a pickle of it is not offloaded.
        device: where it computes; None: where its weights are that belong to no expert. Host memory
            is pinned if this is a GPU.
        keep: so many experts of each layer at most stay on the device between passes: those that
            were used last. By default 0, which takes the least memory.

    Yields:
        ExpertOffload: how many bytes were copied, and how many the device held at most.

    Raises:
        TypeError: the model is no module, or ``keep`` no whole number.
        ValueError: the model has no such layer, or is offloaded already; its weights are sharded,
            or those of experts are on the meta device or in a wrapper; the device does not compute;
            ``keep`` is below 0.
        RuntimeError: in a pass that records gradients, weights of experts require grad again.
    """
    check_module(model)
    check_counts(0, keep=keep)
    layers = _checked_layers(model)
    of_experts = _tensors_of(*(fc for layer in layers.values() for fc in (layer.fc1, layer.fc2)))
    others = _tensors_of(model, without=of_experts)
    offload = ExpertOffload(_checked_device(device, others or of_experts))

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for tensor in of_experts:
            stack.callback(_move, tensor, tensor.device)
            _move(tensor, HOST, pinned=offload.device.type == "cuda")
            if isinstance(tensor, nn.Parameter):
                stack.callback(tensor.requires_grad_, tensor.requires_grad)
                tensor.requires_grad_(False)
        for tensor in others:
            stack.callback(_move, tensor, tensor.device)
            _move(tensor, offload.device)
        for layer in layers.values():
            layer.offloaded = OffloadedExperts(keep, offload)
            stack.callback(delattr, layer, "offloaded")
        yield offload


def _checked_layers(model: nn.Module) -> _Layers:
    """The layers by name."""
    layers: _Layers = {
        name: module for name, module in model.named_modules() if isinstance(module, MoE | SoftMoE)
    }
    if not layers:
        raise ValueError(
            f"model must have MoE or SoftMoE layers, whose experts are offloaded, got a "
            f"{type(model).__name__} without one"
        )
    if is_sharded(model):
        raise ValueError(
            "model must have its weights whole in this process for their offload, got sharded ones"
        )

    for name, layer in layers.items():
        if layer.offloaded is not None:
            raise ValueError(
                f"model must not be offloaded already, got the layer {name!r} inside another block "
                "of offload_experts"
            )
        for fc in (layer.fc1, layer.fc2):
            if not isinstance(fc, ExpertLinear):
                raise ValueError(
                    f"the experts of the layer {name!r} must be ExpertLinear modules, got a "
                    f"{type(fc).__name__} around them"
                )
            if any(tensor.is_meta for tensor in _tensors_of(fc)):
                raise ValueError(
                    f"the experts of the layer {name!r} must have values, got weights on the meta "
                    "device"
                )
    return layers


def _checked_device(device: torch.device | str | None, like: list[Tensor]) -> torch.device:
    """The device, with its number if it is one of several."""
    try:
        found = torch.empty(0, device=like[0].device if device is None else device).device
    except (RuntimeError, AssertionError) as error:  # of a build of torch without this device
        raise ValueError(
            f"device must be one that this machine has, got {str(device)!r}: {error}"
        ) from error
    if found.type == "meta":
        raise ValueError("device must be one that computes, got 'meta'")
    return found


def _tensors_of(*modules: nn.Module, without: list[Tensor] | None = None) -> list[Tensor]:
    """Parameters and buffers, each once."""
    left_out = set(without or ())
    found = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return [tensor for tensor in dict.fromkeys(found) if tensor not in left_out]


def _move(tensor: Tensor, device: torch.device, *, pinned: bool = False) -> None:
    """The tensor stays the same object, as in ``Module.to``."""
    moved = tensor.data.to(device)
    tensor.data = moved.pin_memory() if pinned else moved
