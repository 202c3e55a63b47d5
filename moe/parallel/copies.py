"""Which ranks have copies of a weight."""

from torch import nn

from ironmoe.moe.exchange.group import Group, every_rank
from ironmoe.moe.parallel.layers import expert_layers
from ironmoe.moe.sharded import fsdp_modules


def copies(model: nn.Module) -> dict[nn.Parameter, Group | None]:
    """For each weight the ranks over which its gradient must be averaged after the backward pass;
    None where nothing is left to do, as FSDP2 does it. Gradients of experts that are shared out
    come from the tokens of all ranks that share them, so the ranks with copies of these experts are
    left. Every rank must call it.

    A model that is not on several ranks by ``parallelize`` has a copy on each.
    """
    found: dict[nn.Parameter, Group | None] = dict.fromkeys(model.parameters(), every_rank())
    for layer in expert_layers(model).values():
        if layer.expert_parallel is not None:
            for module in layer.expert_modules().values():
                found |= dict.fromkeys(module.parameters(), layer.expert_parallel.copies)
    for module in fsdp_modules(model):
        found |= dict.fromkeys(module.parameters())
    return found
