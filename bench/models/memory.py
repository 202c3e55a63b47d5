"""Less device memory under attack, for more time; verdicts stay what they are."""

from contextlib import ExitStack

import torch
from torch import nn

from ironmoe.bench.common.user_error import UserError
from ironmoe.moe import MoE, offload_experts

HOST = torch.device("cpu")


def loading_device(
    device: torch.device, *, offload: bool = False, expert_parallel: int = 1
) -> torch.device:
    """Where a model is loaded: in host memory, if its experts are to stay there or to be shared out
    over devices that cannot hold all of them."""
    return HOST if offload or expert_parallel > 1 else device


def save_memory(
    model: nn.Module, device: torch.device, within: ExitStack, *, offload: bool, recompute: bool
) -> list[str]:
    """Until ``within`` ends, let experts lie in host memory; let MoE layers compute their
    pre-activations again in the backward pass.

    Returns:
        Notes for the user.

    Raises:
        UserError: the model has no such layers, or its experts cannot be offloaded.
    """
    if recompute:
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        if not layers:
            raise UserError(
                f"--recompute needs a model with MoE layers, and {type(model).__name__} has none"
            )
        for layer in layers:
            within.callback(setattr, layer, "recompute", layer.recompute)
            layer.recompute = True

    if not offload:
        return []
    try:
        within.enter_context(offload_experts(model, device))
    except ValueError as error:
        raise UserError(f"--offload-experts: {error}") from error
    if device.type == "cpu":
        return ["--offload-experts saves memory of a GPU; on a CPU it takes more, and more time."]
    return []
