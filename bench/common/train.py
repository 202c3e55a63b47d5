"""Train one model. A training that was interrupted goes on from its last finished epoch."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ironmoe.bench.common.files import write_atomically
from ironmoe.bench.common.loop.batches import batches, epoch_seed
from ironmoe.bench.common.loop.schedules import (
    LearningRateSchedule,
    one_cycle,
    warmup_and_cosine,
)
from ironmoe.bench.common.user_error import UserError
from ironmoe.moe import collect_aux_loss

__all__ = [
    "Adversary",
    "LearningRateSchedule",
    "Recipe",
    "TrainingError",
    "TrainingProgress",
    "default_epochs",
    "one_cycle",
    "train",
]


class TrainingError(UserError):
    """Training cannot go on; the message says why and what to try."""


class Recipe(NamedTuple):
    """AdamW with linear warm-up and cosine decay."""

    epochs: int = 12
    batch_size: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_norm: float = 1.0


def default_epochs(num_images: int) -> int:
    """12 epochs; on fewer than 4,000 images as many as show the model 48,000 images, up to 100."""
    return min(100, max(12, math.ceil(48_000 / num_images)))


class TrainingProgress(NamedTuple):
    """What a progress bar shows after each step."""

    step: int
    steps: int
    loss: float
    accuracy: float


# (images, labels, epoch) → the images that are trained on in their place
Adversary = Callable[[Tensor, Tensor, int], Tensor]


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    state_file: Path | None = None,
    autocast_dtype: torch.dtype | None = None,
    schedule: LearningRateSchedule | None = None,
    shifts: bool = True,
    adversary: Adversary | None = None,
    on_step: Callable[[TrainingProgress], None] | None = None,
) -> float:
    """Train in place; the model is in eval mode afterwards.

    After every epoch model and optimizer are written to ``state_file``; a later call goes on from
    there and ends with the same weights, because batches, shifts and router noise depend on (seed,
    epoch) alone.

    Args:
        images: (N, C, S, S) in [0, 1]; labels: (N,) int64.
        state_file: None if the training is not to be interrupted.
        schedule: of the learning rate; None is linear warm-up and cosine decay.
        shifts: whether each image is moved by a few pixels.
        adversary: makes the images harder, for adversarial training.

    Returns:
        The seconds it took, all sessions together.

    Raises:
        TrainingError: the loss is not finite at the end of an epoch.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    steps_per_epoch = math.ceil(len(images) / recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    set_rates = (schedule or warmup_and_cosine(recipe.warmup))(optimizer, steps)

    first_epoch, seconds = _restore(state_file, model, optimizer)
    for epoch in range(first_epoch, recipe.epochs):
        start = time.perf_counter()
        torch.manual_seed(epoch_seed(seed, epoch))  # router noise
        averages = _Averages()

        of_epoch = batches(images, labels, recipe.batch_size, seed, epoch, shifts)
        for i, (batch, targets) in enumerate(of_epoch):
            step = epoch * steps_per_epoch + i
            set_rates(step)
            batch, targets = _to_device_of(model, batch, targets)
            if adversary is not None:
                batch = adversary(batch, targets, epoch)
            loss, logits = _step(model, optimizer, batch, targets, recipe, autocast_dtype)

            averages.add(loss, logits, targets)
            if on_step is not None:
                on_step(TrainingProgress(step + 1, steps, averages.loss, averages.accuracy))

        if not math.isfinite(averages.loss):
            raise TrainingError(
                f"training diverged in epoch {epoch + 1} (loss {averages.loss}); try a lower "
                "learning rate"
            )
        seconds += time.perf_counter() - start
        if state_file is not None:
            write_atomically(state_file, _snapshot(model, optimizer, epoch + 1, seconds))

    model.eval()
    return seconds


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    targets: Tensor,
    recipe: Recipe,
    autocast_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Make one step of the optimizer.

    Returns:
        (the loss without the part of the router, the logits)
    """
    model.train()
    with torch.autocast(
        batch.device.type, enabled=autocast_dtype is not None, dtype=autocast_dtype
    ):
        logits = model(batch)
    loss = nn.functional.cross_entropy(logits.float(), targets)

    optimizer.zero_grad(set_to_none=True)
    (loss + collect_aux_loss(model)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return loss.detach(), logits.detach()


class _Averages:
    """Running averages over the steps of an epoch, which forget slowly."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.accuracy = 0.0
        self._steps = 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        keep = min(0.95, self._steps / (self._steps + 1))
        accuracy = (logits.argmax(1) == targets).float().mean().item()
        self.loss = keep * self.loss + (1 - keep) * loss.item()
        self.accuracy = keep * self.accuracy + (1 - keep) * accuracy
        self._steps += 1


def _to_device_of(model: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    return tuple(tensor.to(device) for tensor in tensors)


def _snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, seconds: float
) -> bytes:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    return save(tensors, {"epoch": str(epoch), "seconds": json.dumps(seconds)})


def _restore(
    state_file: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """(first epoch to do, seconds already spent)."""
    if state_file is None or not state_file.is_file():
        return 0, 0.0
    with safe_open(state_file, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )

    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor

    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return int(metadata["epoch"]), json.loads(metadata["seconds"])
