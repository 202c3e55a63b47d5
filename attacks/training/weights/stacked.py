"""Which weights of a model are those of several experts, stacked along the first axis."""

from torch import nn

from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.layers.expert_linear import ExpertLinear


def stacked_experts(model: nn.Module) -> set[nn.Parameter]:
    """Weights (E, …) and biases (E, …) of the layers of ``MoE`` and ``SoftMoE``, and of Hugging
    Face's Experts modules."""
    layers: list[tuple[nn.Module, int]] = [
        (module, module.num_experts)
        for module in model.modules()
        if isinstance(module, ExpertLinear)
    ]
    layers += [(site.experts, site.num_experts) for site in expert_sites(model)]
    return {
        weight
        for layer, num_experts in layers
        for weight in layer.parameters()
        if weight.ndim and weight.shape[0] == num_experts
    }
