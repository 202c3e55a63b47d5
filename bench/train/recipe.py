"""What a training is asked to do: the recipe of its loop, the method, the budget of the attack on
its result."""

from typing import Any, NamedTuple

import torch

from ironmoe.bench.common.loop.schedules import (
    LearningRateSchedule,
    one_cycle,
    warmup_and_cosine,
)
from ironmoe.bench.common.radii import from_255

SCHEDULES = {"one-cycle": one_cycle(0.2), "cosine": warmup_and_cosine(0.1)}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
STANDARD = "standard"


class TrainRecipe(NamedTuple):
    """AdamW and what the loop does around it.

    parts: in how many a batch is split, whose gradients add up; ema: decay of the averaged weights,
    None without them; clip_norm: of the gradients of a batch; dtype: of the model under autocast;
    shifts: whether each image is moved by a few pixels.
    """

    epochs: int = 12
    batch_size: int = 100
    parts: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    schedule: str = "one-cycle"
    clip_norm: float = 1.0
    ema: float | None = None
    shifts: bool = False
    dtype: str = "float32"
    checkpointing: bool = False
    compile: bool = False

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype]

    @property
    def images_of_part(self) -> int:
        """How many images of a batch go through the model at once, at least."""
        return self.batch_size // self.parts

    @property
    def rates(self) -> LearningRateSchedule:
        return SCHEDULES[self.schedule]

    def steps_of_epoch(self, images: int) -> int:
        """How many batches an epoch has. What is left over is a batch of its own if each part gets
        at least two images of it; else it is left out, and other images next time."""
        whole, rest = divmod(images, self.batch_size)
        return whole + (rest >= 2 * self.parts)


class MethodChoice(NamedTuple):
    """A method of adversarial training and its settings.

    eps_255, alpha_255: in units of 1/255 of the pixel range; steps, alpha_255: None is the
    method's own; routing: what the inner attack does to routing, a name in ``ROUTING`` of
    ``ironmoe attack``; awp: gamma, None without it; own: options that only some methods take.
    """

    name: str = "pgd-at"
    eps_255: float = 8.0
    norm: str = "Linf"
    steps: int | None = None
    alpha_255: float | None = None
    mode: str = "eval"
    routing: str = "free"
    label_smoothing: float = 0.0
    awp: float | None = None
    own: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it

    @property
    def eps(self) -> float:
        return from_255(self.eps_255)

    @property
    def alpha(self) -> float | None:
        return None if self.alpha_255 is None else from_255(self.alpha_255)
