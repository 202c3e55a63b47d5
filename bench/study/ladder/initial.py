"""Initial weights that are paired: modules that several arms share begin with the same numbers."""

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ironmoe.bench.study.ladder.arms import Arm, Size, arguments
from ironmoe.moe import VMoE


def new_model(
    arm: Arm, image_shape: tuple[int, ...], num_classes: int, size: Size, seed: int
) -> VMoE:
    """The model of an arm with the initial weights of this seed.

    Each module draws from a generator of its own, which its name and the seed determine. So a
    module of one name and shape begins alike in every arm, whatever else the arm has: models of one
    seed differ in their experts and routers alone. The caller's generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]), constant_gates_known():
        model = VMoE(**arguments(arm, image_shape, num_classes, size))
        draw_by_name(model, seed)
    return model


@contextmanager
def constant_gates_known() -> Iterator[None]:
    """Inside the block nobody is warned of a router whose only gate is 1: an arm has it on purpose,
    and the report says what it means."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "top_k=1 and renormalize=True", UserWarning)
        yield


def draw_by_name(model: nn.Module, seed: int) -> None:
    """Draw the weights of every module that can reset itself anew, by seed and name."""
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            reset()
