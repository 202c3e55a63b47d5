"""Borrow a user's model and hand it back as it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ironmoe.moe import freeze_weights
from ironmoe.moe.parallel.lock_step import check_in_step
from ironmoe.moe.routers.aux_losses import AuxLosses


@contextmanager
def borrowed(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Eval mode, frozen weights and gradients on inside the block, whatever surrounds it.

    Restored afterwards, also after an exception: the training flag of each module, requires_grad of
    each parameter, the auxiliary losses that a layer holds for their collection, the random state
    of CPU and of every GPU in use. ``.grad`` is never written. A callable that is no nn.Module has
    no such state.

    Raises:
        ValueError: other processes have a part of the weights, and this is no block of ``in_step``.
    """
    check_in_step(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())

        # Forking the random state of a GPU would initialise CUDA in a process that does not use it.
        used_gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices=used_gpus))

        if isinstance(model, nn.Module):
            stack.enter_context(freeze_weights(model))

            # Layers let go of the losses that they hold when they go into eval mode.
            stack.enter_context(other_aux_losses(model))
            stack.enter_context(in_eval_mode(model))

        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in eval mode inside the block. Each has its own training flag back
    afterwards, also after an exception."""
    # A program that torch.jit.freeze made has no such flag.
    with_flag = (module for module in model.modules() if hasattr(module, "training"))
    flags = [(module, module.training) for module in with_flag]
    try:
        _enter_eval_mode(model)
        yield
    finally:
        for module, training in flags:
            module.training = training


def _enter_eval_mode(module: nn.Module) -> None:
    """``module.eval()``. A program of torch.export refuses that, since its mode is fixed; what it
    is a part of still goes into eval mode."""
    try:
        module.eval()
    except NotImplementedError:
        module.training = False
        for child in module.children():
            _enter_eval_mode(child)


@contextmanager
def other_aux_losses(model: nn.Module) -> Iterator[None]:
    """Inside the block layers hold other auxiliary losses: none at first."""
    with ExitStack() as stack:
        for module in model.modules():
            own = vars(module)
            if isinstance(own.get("aux_losses"), AuxLosses):
                stack.enter_context(own["aux_losses"].set_aside())
            for name in ("aux_losses", "aux_loss"):
                if name in own and not isinstance(own[name], AuxLosses):
                    stack.callback(own.__setitem__, name, own[name])
                    own[name] = None
        yield
