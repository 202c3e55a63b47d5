"""The layers of a model whose experts can be shared out over ranks."""

from collections import Counter
from typing import Any

from torch import nn

from ironmoe.kernels.checks import check_module
from ironmoe.moe.adapters.huggingface_ranks import patched_experts
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.layers.soft import SoftMoE


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with experts by name, each once: an ``ExpertLayer`` each.

    Raises:
        TypeError: the model is no module.
    """
    check_module(model)
    own = {n: m for n, m in model.named_modules() if isinstance(m, MoE | SoftMoE)}
    return own | patched_experts(model)


def check_untied(model: nn.Module, layers: dict[str, Any]) -> None:
    """ValueError if a weight of experts is also one of another layer: each layer shares out its
    own, and the two would no longer be one. A layer that is called several times is one layer."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        for module in layer.expert_modules().values():
            for weight, value in module.named_parameters():
                if holders[id(value)] > 1 or id(value) in seen:
                    raise ValueError(
                        f"model must not share weights of experts between layers, got {weight} of "
                        f"{name or 'the model'}, which is also one of "
                        f"{seen.get(id(value), 'another module')}. Share the whole layer, or give "
                        "each weights of its own"
                    )
                seen[id(value)] = name


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
    return sum(state.overflow.take() for state in expert_parallels(model))
