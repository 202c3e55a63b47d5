"""Train one model; any epoch can be the last before an interruption."""

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

from ironmoe.bench.common.run_folder import write_atomically
from ironmoe.moe import collect_aux_loss

MAX_SHIFT = 2  # pixels; the one augmentation


class TrainingError(Exception):
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
    """12, and on fewer than 4,000 images as many more as show the model 48,000 images, up to
    100."""
    return min(100, max(12, math.ceil(48_000 / num_images)))


class Progress(NamedTuple):
    """What the progress bar shows after each step."""

    step: int
    steps: int
    loss: float
    accuracy: float


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    state_file: Path,
    autocast_dtype: torch.dtype | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> float:
    """Train in place and return the seconds it took, all sessions together.

    After every epoch model and optimiser are written to ``state_file``; a later call goes on from
    there and ends with the same weights, because batches, shifts and router noise depend on (seed,
    epoch) alone.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    steps_per_epoch = math.ceil(len(images) / recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    first_epoch, seconds = _restore(state_file, model, optimizer)
    model.train()
    for epoch in range(first_epoch, recipe.epochs):
        start = time.perf_counter()
        torch.manual_seed(seed * 1_000_003 + epoch)  # router noise
        # the same batches for every architecture
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=generator)
        loss_average, accuracy_average = 0.0, 0.0
        for i, rows in enumerate(order.split(recipe.batch_size)):
            step = epoch * steps_per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step / steps, recipe.warmup)
            batch, targets = _shifted(images[rows], generator).to(device), labels[rows].to(device)
            with torch.autocast(
                device.type, enabled=autocast_dtype is not None, dtype=autocast_dtype
            ):
                logits = model(batch)
            loss = nn.functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            (loss + collect_aux_loss(model)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            keep = min(0.95, i / (i + 1))  # a running average that forgets slowly
            accuracy = (logits.argmax(1) == targets).float().mean().item()
            loss_average = keep * loss_average + (1 - keep) * loss.item()
            accuracy_average = keep * accuracy_average + (1 - keep) * accuracy
            if on_step is not None:
                on_step(Progress(step + 1, steps, loss_average, accuracy_average))
        if not math.isfinite(loss_average):
            raise TrainingError(
                f"training diverged in epoch {epoch + 1} (loss {loss_average}); try a lower "
                "learning rate"
            )
        seconds += time.perf_counter() - start
        write_atomically(state_file, _snapshot(model, optimizer, epoch + 1, seconds))
    model.eval()
    return seconds


def _schedule(done: float, warmup: float) -> float:
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to MAX_SHIFT pixels (an eighth of small ones), edges filled with
    zeros."""
    reach = min(MAX_SHIFT, images.shape[-1] // 8)
    padded = nn.functional.pad(images, (reach,) * 4)
    size = images.shape[-1]
    dy, dx = torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator)
    rows = dy[:, None] + torch.arange(size)
    columns = dx[:, None] + torch.arange(size)
    return padded[
        torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def _snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, seconds: float
) -> bytes:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    return save(tensors, {"epoch": str(epoch), "seconds": json.dumps(seconds)})


def _restore(
    state_file: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """(first epoch to do, seconds already spent)."""
    if not state_file.is_file():
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
