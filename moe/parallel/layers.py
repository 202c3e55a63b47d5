"""The layers of a model whose experts can be shared out over ranks."""

from typing import Any

from torch import nn

from ironmoe.kernels.checks import check_module
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with experts by name, each once.

    Raises:
        TypeError: the model is no module.
    """
    check_module(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, MoE | SoftMoE)}


def expert_parallels(model: nn.Module) -> list[ExpertParallel]:
    """How each layer shares out its experts; of those that do not, nothing."""
    states = (layer.expert_parallel for layer in expert_layers(model).values())
    return [state for state in states if state is not None]


def overflowed_choices(model: nn.Module) -> int:
    """How many choices of this rank found no place in the buffers of ``max_tokens_per_rank`` since
    the last call, in all layers: they were dropped, as by a capacity. The host waits for the
    device.

    Raises:
        TypeError: the model is no module.
    """
    return sum(state.take_overflow() for state in expert_parallels(model))
