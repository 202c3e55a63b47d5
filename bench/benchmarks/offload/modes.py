"""Ways to attack a V-MoE in less memory, and what each takes of a pass with the gradient of the
images."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.bench.benchmarks.offload.live_memory import LiveMemory
from ironmoe.bench.train.blocks import checkpoint_blocks
from ironmoe.moe import ExpertOffload, MoE, VMoE, freeze_weights, intervene, offload_experts
from ironmoe.moe.policies import RandomExperts

PLAIN = "all on the device"


class Size(NamedTuple):
    """A V-MoE/16 on 224 × 224 pixels whose every second block has experts."""

    width: int
    blocks: int
    experts: int

    @property
    def name(self) -> str:
        return f"{self.blocks} blocks of width {self.width}, {self.experts} experts"

    def model(self) -> VMoE:
        """With the same weights each time."""
        torch.manual_seed(0)
        model = VMoE(
            224,
            16,
            self.width,
            self.blocks,
            max(self.width // 64, 1),
            4 * self.width,
            1000,
            range(1, self.blocks, 2),
            self.experts,
        )
        nn.init.normal_(model.head.weight)  # its zeros would give the images no gradient
        return model.eval()


def _as_it_is(within: ExitStack, model: VMoE) -> None:
    pass


def _recomputed(within: ExitStack, model: VMoE) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            module.recompute = True


def _checkpointed(within: ExitStack, model: VMoE) -> None:
    checkpoint_blocks(model)


def _offloaded(within: ExitStack, model: VMoE, *, stay: float = 0.0) -> ExpertOffload:
    experts = max(module.num_experts for module in model.modules() if isinstance(module, MoE))
    return within.enter_context(offload_experts(model, keep=round(stay * experts)))


def _offloaded_and_checkpointed(within: ExitStack, model: VMoE) -> ExpertOffload:
    _checkpointed(within, model)
    return _offloaded(within, model)


Prepare = Callable[[ExitStack, VMoE], ExpertOffload | None]
MODES: dict[str, Prepare] = {
    PLAIN: _as_it_is,
    "recompute": _recomputed,
    "checkpointing": _checkpointed,
    "offload": _offloaded,
    "offload, half stay": partial(_offloaded, stay=0.5),
    "offload, checkpointing": _offloaded_and_checkpointed,
}


class Memory(NamedTuple):
    """Bytes of one pass.

    copied: from host memory; saved: alive between forward and backward pass, beside weights; peak:
    alive at most, beside weights that stay; weights: that stay on the device
    """

    copied: int
    saved: int
    peak: int
    weights: int


class Attacked:
    """A model in one mode, with frozen weights, until ``within`` ends."""

    def __init__(self, within: ExitStack, size: Size, mode: str, images: int) -> None:
        self.model = size.model()
        self.offload = MODES[mode](within, self.model)
        within.enter_context(freeze_weights(self.model))
        # as even as a balanced router's: an untrained one sends most tokens to a few experts
        within.enter_context(intervene(self.model, RandomExperts()))
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(images, 3, 224, 224, generator=generator).requires_grad_()

    def gradient(self) -> Tensor:
        """Of the images: one step of an attack."""
        return self._backward(self._forward())

    def memory(self) -> Memory:
        """Counted in the second of two passes."""
        with LiveMemory(without=self.model.parameters()) as memory:
            self.gradient()
            before = self._copied
            memory.peak = 0
            loss = self._forward()
            saved = memory.live
            self._backward(loss)
        return Memory(self._copied - before, saved, memory.peak, self._weights())

    @property
    def _copied(self) -> int:
        return 0 if self.offload is None else self.offload.copied_bytes

    def _forward(self) -> Tensor:
        return self.model(self.images).square().sum()

    def _backward(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, [self.images])[0]

    def _weights(self) -> int:
        everything = sum(weight.nbytes for weight in self.model.parameters())
        if self.offload is None:
            return everything
        layers = (module for module in self.model.modules() if isinstance(module, MoE))
        return everything - sum(
            weight.nbytes
            for layer in layers
            for fc in (layer.fc1, layer.fc2)
            for weight in fc.parameters()
        )
