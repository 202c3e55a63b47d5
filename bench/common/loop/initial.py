"""Initial weights that are paired: what several models have in common begins with the same
numbers."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ironmoe.moe import VMoE


def paired_model(arguments: Mapping[str, Any], seed: int) -> VMoE:
    """``VMoE(**arguments)`` on CPU with the initial weights of this seed.

    Each module draws from a generator of its own, which its name and the seed determine. So a
    module of one name and shape begins alike in every model, whatever else the model has: models of
    one seed differ in their experts and routers alone. The caller's generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        model = VMoE(**arguments)
        draw_by_name(model, seed)
    return model


def draw_by_name(model: nn.Module, seed: int) -> None:
    """Draw the weights of every module that can reset itself anew, by seed and name."""
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            reset()
