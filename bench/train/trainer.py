"""The loop over epochs: train, look at the held-out images, keep the best weights, write the
state."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.training import TrainingMethod
from ironmoe.bench.common.loop.batches import batches
from ironmoe.bench.common.processes import Processes
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.held_out import HeldOut, HeldOutRows
from ironmoe.bench.train.parallel import (
    full_state,
    gathered,
    load_full_state,
    load_optimizer_state,
    optimizer_state,
)
from ironmoe.bench.train.recipe import TrainRecipe
from ironmoe.bench.train.state import Tensors, TrainingState, copied, parted, read_state
from ironmoe.bench.train.updates import Updates
from ironmoe.bench.train.watch import Watch

Numbers = dict[str, Any]


class TrainedOn(NamedTuple):
    """images (N, C, S, S) in [0, 1] on the CPU; labels (N,)."""

    images: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """weights: those of the epoch that the held-out images chose; chosen: its number, from 1; curves:
    the numbers of every epoch; warnings: what was noticed; seconds: all sessions together."""

    weights: Tensors
    chosen: int
    curves: list[Numbers]
    warnings: list[str]
    seconds: float


class Trainer:
    """Trains one model, from where the state file says that it was interrupted.

    Batches, shifts and random numbers depend on (seed, step, part) alone, so a training that was
    interrupted ends with the weights of one that was not.
    """

    def __init__(
        self,
        model: nn.Module,
        method: TrainingMethod,
        recipe: TrainRecipe,
        data: TrainedOn,
        held_out: HeldOutRows,
        *,
        seed: int,
        by: str,
        group: Processes,
        state_file: Path,
        watch: Watch,
        average: Any = None,
    ) -> None:
        """by: "robust" or "clean", the held-out accuracy that chooses the weights; average: of the
        weights, in whose place it is measured and chosen; None: the weights themselves."""
        self.model = model
        self.method = method
        self.recipe = recipe
        self.data = data
        self.held_out = held_out
        self.seed = seed
        self.by = by
        self.group = group
        self.state_file = state_file
        self.watch = watch
        self.average = average
        self.batches = recipe.steps_of_epoch(len(data.images))
        self.updates = Updates(
            model,
            method,
            recipe,
            seed=seed,
            steps=recipe.epochs * self.batches,
            group=group,
        )
        self.best: Tensors = {}
        self.numbers: Numbers = {"epoch": 0, "seconds": 0.0, "chosen": 0, "curves": []}

    def run(self, display: Display) -> Trained:
        """Train the epochs that are left.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; the state file has the weights after the
                last finished epoch.
        """
        if not self._restore():
            self._write()  # from here on there are weights on disk that are good
        while self.numbers["epoch"] < self.recipe.epochs and not self.watch.stopped:
            start = time.perf_counter()
            measured = self._epoch(self.numbers["epoch"], display)
            self.numbers["seconds"] += self.group.largest(time.perf_counter() - start)
            self.numbers["epoch"] += 1
            self._keep(measured, display)
            self._write()
        return Trained(
            self.best,
            self.numbers["chosen"],
            self.numbers["curves"],
            self.watch.messages,
            self.numbers["seconds"],
        )

    def _epoch(self, epoch: int, display: Display) -> Numbers:
        """Train one epoch, and return its numbers."""
        self.model.train()
        device = next(self.model.parameters()).device
        of_epoch = batches(
            *self.data, self.recipe.batch_size, self.seed, epoch, self.recipe.shifts
        )
        losses, right = 0.0, 0.0
        for i, (images, labels) in zip(range(self.batches), of_epoch, strict=False):
            step = epoch * self.batches + i
            now = self.updates.make(images.to(device), labels.to(device), step)
            if self.average is not None:
                self.average.update()
            losses += now.loss / self.batches
            right += now.accuracy / self.batches
            display.batch(step, now)

        measured = self._measured()
        return {
            "epoch": epoch + 1,
            "loss": losses,
            "trained_on": right,
            "eps": self.method.strength.eps,
            "rate": self.updates.rate,
            **measured._asdict(),
            **self.watch.after_epoch(self.model),
        }
