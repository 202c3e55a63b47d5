"""Borrow a user's model and hand it back as it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ironmoe.moe import freeze_weights


@contextmanager
def borrowed(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Eval mode, frozen weights and gradients on inside the block, whatever surrounds it.

    Restored afterwards, also after an exception: the training flag of each module, requires_grad of
    each parameter, the ``aux_loss`` that a layer holds since its last forward, the random state of
    CPU and of every GPU in use. ``.grad`` is never written. A callable that is no nn.Module has no
    such state.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())

        # Forking the random state of a GPU would initialise CUDA in a process that does not use it.
        used_gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices=used_gpus))

        if isinstance(model, nn.Module):
            stack.enter_context(freeze_weights(model))

            flags = [(module, module.training) for module in model.modules()]
            stack.callback(_set_training, flags)

            losses = [
                (module, vars(module)["aux_loss"])
                for module in model.modules()
                if "aux_loss" in vars(module)
            ]
            stack.callback(_set_aux_loss, losses)
            model.eval()

        yield


def _set_training(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training


def _set_aux_loss(losses: list[tuple[nn.Module, object]]) -> None:
    for module, loss in losses:
        vars(module)["aux_loss"] = loss
