"""A small training as ``ironmoe train`` makes it, in one process or in several.

In float64, because FSDP2 and expert parallelism may differ in the last bit, and in float32 the sign
of a gradient that is 0 but for rounding may turn.
"""

import torch
import torch.distributed as dist
from torch import nn

from ironmoe.attacks.training import EMA
from ironmoe.bench.common.processes import Processes
from ironmoe.bench.train.full_state import (
    averaged_state,
    full_state,
    load_averaged_state,
    load_full_state,
    load_optimizer_state,
    optimizer_state,
)
from ironmoe.bench.train.parallel import gathered_parts, prepared
from ironmoe.bench.train.recipe import TrainRecipe
from ironmoe.bench.train.updates import Updates
from ironmoe.moe import VMoE

CPU = torch.device("cpu")
LABELS = torch.arange(8) % 3


def images():
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def group():
    if not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


def make():
    torch.manual_seed(5 * group().rank)  # process 0 gives the others its weights
    model = VMoE(
        8,
        4,
        16,
        2,
        2,
        16,  # as wide as the rest: DTensor thinks long about an operation on each new shape
        3,
        moe_layers=(1,),
        num_experts=4,
        channels=1,
        router={"selection_bias": True},
    )
    nn.init.normal_(model.head.weight)
    return model.double()


class Training:
    """options: of ``prepared``."""

    def __init__(self, make_method, parts=2, dtype=torch.float64, checkpointing=None, **options):
        model = make().to(dtype)
        if checkpointing is not None:
            checkpointing(model)
        self.model = prepared(model, device=CPU, **{"fsdp": False} | options).train()
        self.images = images().to(dtype)
        self.method = make_method(self.model)
        recipe = TrainRecipe(batch_size=8, parts=parts)
        self.updates = Updates(self.model, self.method, recipe, seed=0, steps=8, group=group())
        self.average = EMA(self.model, 0.9)

    def run(self, steps):
        losses = []
        for step in steps:
            losses.append(self.updates.make(self.images, LABELS, step).loss)
            self.average.update()
        return losses

    def state(self):
        state = {"model": full_state(self.model)}
        for name, optimizer in self.updates.optimizers.items():
            state[name] = optimizer_state(self.model, optimizer)
        state["average"], self.numbers = averaged_state(self.average)
        return state | {"method": gathered_parts(self.method.state_dict())}

    def load(self, state, numbers):
        load_full_state(self.model, state["model"])
        for name, optimizer in self.updates.optimizers.items():
            load_optimizer_state(self.model, optimizer, state[name])
        load_averaged_state(self.average, state["average"], numbers)
        self.method.load_state_dict(state["method"])


def still(model):
    """No noise, and no loss that is not linear in the images of a batch."""
    for module in model.modules():
        if hasattr(module, "noise_std"):
            module.noise_std, module.importance_weight, module.load_weight = 0.0, 0.0, 0.0
    return model
