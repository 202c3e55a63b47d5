"""The models of the ladder before their training."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ironmoe.bench.common.loop.initial import paired_model
from ironmoe.bench.study.ladder.arms import Arm, Size, arguments
from ironmoe.moe import VMoE


def new_model(
    arm: Arm, image_shape: tuple[int, ...], num_classes: int, size: Size, seed: int
) -> VMoE:
    """The model of an arm with the initial weights of this seed, those of ``paired_model``."""
    with constant_gates_known():
        return paired_model(arguments(arm, image_shape, num_classes, size), seed)


@contextmanager
def constant_gates_known() -> Iterator[None]:
    """Inside the block nobody is warned of a router whose only gate is 1: an arm has it on purpose,
    and the report says what it means."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "top_k=1 and renormalize=True", UserWarning)
        yield
