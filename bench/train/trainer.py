"""The loop over epochs: train, look at the held-out images, keep the best weights, write the
state."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ironmoe.attacks.training import EMA, TRAINING_METHODS, OverfittingGuard, TrainingMethod
from ironmoe.bench.common.loop.batches import batches
from ironmoe.bench.common.processes import Processes
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.full_state import (
    averaged_state,
    full_state,
    load_averaged_state,
    load_full_state,
    load_optimizer_state,
    optimizer_state,
)
from ironmoe.bench.train.held_out import HeldOutRows
from ironmoe.bench.train.making import make_method
from ironmoe.bench.train.parallel import gathered_parts
from ironmoe.bench.train.recipe import STANDARD, MethodChoice, TrainRecipe
from ironmoe.bench.train.rows import checked_split
from ironmoe.bench.train.state import Numbers, Tensors, TrainingState, parted, read_state
from ironmoe.bench.train.updates import Updates
from ironmoe.bench.train.watch import Watch


class TrainedOn(NamedTuple):
    """images (N, C, S, S) in [0, 1] on the CPU; labels (N,)."""

    images: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """weights: those of the epoch that the held-out images chose, in the first process; chosen: its
    number, from 1; curves: the numbers of every epoch; warnings: what was noticed; stopped: whether
    the training ended early for that; seconds: all sessions together."""

    weights: Tensors
    chosen: int
    curves: list[Numbers]
    warnings: list[str]
    stopped: bool
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
    ) -> None:
        """by: "robust" or "clean", the held-out accuracy that chooses the weights. With averaged
        weights these are measured and chosen."""
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
        self.batches = recipe.steps_of_epoch(len(data.images))
        self.updates = Updates(
            model,
            method,
            recipe,
            seed=seed,
            steps=recipe.epochs * self.batches,
            group=group,
        )
        self.average = None if recipe.ema is None else EMA(model, recipe.ema)
        self.best: Tensors = {}
        self.numbers: Numbers = {"epoch": 0, "seconds": 0.0, "chosen": 0, "curves": []}

    def run(self, display: Display) -> Trained:
        """Train the epochs that are left.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; the state file has the weights after the
                last finished epoch.
        """
        if not self._restore():
            self._write()  # from here on there are good weights on disk
        while self.numbers["epoch"] < self.recipe.epochs and not self.watch.stopped:
            start = time.perf_counter()
            with self.watch.noticing(display.say):
                curve = self._epoch(self.numbers["epoch"], display)
            curve |= self.watch.after_epoch(display.say)
            with self._averaged():
                curve |= self.held_out.measure(self.model)._asdict()
                self._choose(curve)
            self.numbers["seconds"] += self.group.largest(time.perf_counter() - start)
            self.numbers["epoch"] += 1
            self._write()
            display.epoch(curve)
        return Trained(
            self.best,
            self.numbers["chosen"],
            self.numbers["curves"],
            self.watch.messages,
            self.watch.stopped,
            self.numbers["seconds"],
        )

    def _epoch(self, epoch: int, display: Display) -> Numbers:
        """Train one epoch; returns its numbers."""
        self.model.train()
        device = next(self.model.parameters()).device
        of_epoch = batches(*self.data, self.recipe.batch_size, self.seed, epoch, self.recipe.shifts)
        losses, right = 0.0, 0.0
        for i, (images, labels) in zip(range(self.batches), of_epoch, strict=False):
            step = epoch * self.batches + i
            now = self.updates.make(images.to(device), labels.to(device), step, self._take_average)
            losses += now.loss / self.batches
            right += now.accuracy / self.batches
            display.batch(step, now)

        return {
            "epoch": epoch + 1,
            "loss": losses,
            "trained_on": right,
            "eps": self.method.strength.eps,
            "rate": self.updates.rate,
        }

    def _take_average(self) -> None:
        """After each step of an optimizer."""
        if self.average is not None:
            self.average.update()

    def _averaged(self) -> AbstractContextManager[object]:
        """Inside the block the model has the weights that are measured and chosen."""
        return nullcontext() if self.average is None else self.average.applied()

    def _choose(self, curve: Numbers) -> None:
        """Keep the weights of this epoch if the held-out images say that no epoch before had better
        ones. Those of an epoch at whose end the training is stopped are not kept, unless it is
        the first."""
        self.numbers["curves"].append(curve)
        curves = self.numbers["curves"]
        other = "clean" if self.by == "robust" else "robust"
        rank = "learned", self.by, other, "epoch"
        best = max(curves, key=lambda each: tuple(each[name] for name in rank))
        if best is curve and not (self.watch.stopped and self.numbers["chosen"]):
            self.numbers["chosen"] = curve["epoch"]
            self.best = full_state(self.model)

    def _write(self) -> None:
        method_tensors, method_numbers = parted(self._method_state())
        numbers = self.numbers | {"method": method_numbers, "watch": self.watch.state}
        tensors = {"model": full_state(self.model), "best": self.best, "method": method_tensors}
        if self.average is not None:
            tensors["average"], numbers["average"] = averaged_state(self.average)
        for name, optimizer in self.updates.optimizers.items():
            tensors[f"optimizer.{name}"] = optimizer_state(self.model, optimizer)
        self.group.first(lambda: TrainingState(tensors, numbers).write(self.state_file))

    def _method_state(self) -> Numbers:
        """What the method keeps, of the parts of all processes."""
        tensors, numbers = parted(self.method.state_dict())
        return gathered_parts({name: tensor.cpu() for name, tensor in tensors.items()} | numbers)

    def _restore(self) -> bool:
        """Go on from the state file; False if there is none."""
        state = read_state(self.state_file)
        if state is None:
            return False
        numbers = dict(state.numbers)
        self.method.load_state_dict(state.of("method") | numbers.pop("method"))
        self.watch.state = numbers.pop("watch")

        if self.average is not None:
            load_averaged_state(self.average, state.of("average"), numbers.pop("average"))
        first = self.group.is_first  # it alone hands whole tensors to the others
        load_full_state(self.model, state.of("model") if first else {})
        for name, optimizer in self.updates.optimizers.items():
            saved = state.of(f"optimizer.{name}") if first else {}
            load_optimizer_state(self.model, optimizer, saved)
        self.best = state.of("best") if first else {}
        self.numbers = numbers
        return True


def train_for_study(
    model: nn.Module,
    data: ImageData,
    choice: MethodChoice,
    recipe: TrainRecipe,
    *,
    seed: int,
    state_file: Path,
    display: Display,
) -> Trained:
    """One of many trainings that are compared: on this process alone, in float32, with weights
    chosen by held-out images at the eps and norm of the training. It goes on from the state file,
    which is removed at the end."""
    rows = checked_split(data, recipe, 1)
    batches_in_all = recipe.epochs * recipe.steps_of_epoch(len(rows.trained))
    method, _ = make_method(choice, recipe, model, batches=batches_in_all)

    held_out = HeldOutRows(
        data.images[rows.held_out],
        data.labels[rows.held_out],
        eps=choice.eps,
        norm=choice.norm,
        dtype=None,
        together=recipe.batch_size,
    )
    guard = None
    if TRAINING_METHODS[choice.name].single_step:
        guard = OverfittingGuard(method, held_out.images, held_out.labels)
    trainer = Trainer(
        model,
        method,
        recipe,
        TrainedOn(data.images[rows.trained], data.labels[rows.trained]),
        held_out,
        seed=seed,
        by="clean" if choice.name == STANDARD else "robust",
        group=Processes(),
        state_file=state_file,
        watch=Watch(guard, method.alarm),
    )
    with display:
        trained = trainer.run(display)
    state_file.unlink(missing_ok=True)
    return trained
