"""Lend a model that trains to the attack that makes its images, and take it back as it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ironmoe.attacks.engine.borrow import in_eval_mode, other_aux_losses
from ironmoe.moe import freeze_weights
from ironmoe.moe.routers.global_load import GlobalLoad
from ironmoe.moe.routers.selection_bias import WithSelectionBias

Mode = Literal["eval", "train"]


def check_mode(mode: str) -> None:
    """ValueError: ``mode`` is no Mode."""
    if mode not in get_args(Mode):
        raise ValueError(f'mode must be "eval" or "train", got {mode!r}')


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper DistributedDataParallel, which torch.compile may have wrapped again; None where
    there is none."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def inside_of_ddp(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel wraps. The wrapper expects a backward pass to the
    weights after each forward pass, and an inner attack makes none."""
    ddp = ddp_of(model)
    return model if ddp is None else ddp.module


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Inside the block new tensors are none of ``torch.inference_mode``, which autograd refuses.
    Gradients are on or off as around it."""
    has_grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(has_grad):
        yield


def constant(tensor: Tensor) -> Tensor:
    """Detached; of an inference tensor, a copy that autograd takes."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def lent(model: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """Inside the block gradients are on. Forward passes leave no auxiliary loss behind, count no
    choice of a router, and keep nothing that only a gradient of a weight would need.

    Weights are frozen, except those that FSDP2 shards; see ``freeze_weights``. A gradient of the
    image alone costs them no product either way.

    mode: "eval" puts the model into eval mode for the block; "train" leaves its modes as they are.
    """
    with ExitStack() as stack:
        stack.enter_context(normal_tensors())
        stack.enter_context(torch.enable_grad())

        stack.enter_context(freeze_weights(model))
        stack.enter_context(other_aux_losses(model))
        if mode == "eval":
            stack.enter_context(in_eval_mode(model))
        else:
            stack.enter_context(_uncounted(model))
        yield


@contextmanager
def leaving_nothing(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs as it is, in training mode, too. Its passes leave no
    auxiliary loss behind, count no choice of a router, and change no buffer, such as the statistics
    of batch norm. Random numbers go on afterwards as before the block, so that the next pass meets
    the same noise and dropout."""
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with _same_random_numbers(model), other_aux_losses(model), _uncounted(model):
            yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in kept:
                buffers[name] = buffer.copy_(value)


def _same_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    """Around passes whose random numbers are drawn again after the block."""
    places = {weight.device for weight in model.parameters()}
    return torch.random.fork_rng([place for place in places if place.type == "cuda"])


@contextmanager
def _uncounted(model: nn.Module) -> Iterator[None]:
    """Inside the block routers in training mode count in copies, which are thrown away."""
    kept: list[tuple[object, str, Tensor | None]] = []
    for module in model.modules():
        load = vars(module).get("global_load")
        for owner, name in ((module, "choices"), (load, "counts")):
            if not isinstance(owner, WithSelectionBias | GlobalLoad):
                continue
            counts = getattr(owner, name)
            kept.append((owner, name, counts))
            setattr(owner, name, None if counts is None else counts.clone())
    try:
        yield
    finally:
        for owner, name, counts in kept:
            setattr(owner, name, counts)
