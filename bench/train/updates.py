"""From a batch to steps of the optimizers: parts, processes, clipping."""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.training import (
    NonFiniteLoss,
    TrainingMethod,
    Update,
)
from ironmoe.bench.common.processes import Processes
from ironmoe.bench.train.gradients import MeanGradients
from ironmoe.bench.train.parallel import average_running_statistics, mean_over_processes
from ironmoe.bench.train.recipe import TrainRecipe
from ironmoe.moe import start_global_batch, update_selection_bias
from ironmoe.moe.distributed import clip_grad_norm_
from ironmoe.moe.routers.selection_bias import WithSelectionBias


class NonFiniteGradient(NonFiniteLoss):
    """The loss is finite, and a gradient of it is not. layer: the weight that has this gradient;
    step: the number of the batch, from 0."""

    def __init__(self, layer: str, step: int) -> None:
        self.layer = layer
        self.step = step
        RuntimeError.__init__(
            self,
            f"gradients must be finite, got one of {layer!r} that is not at step {step}. The "
            "weights are still those before this update: take a lower learning rate",
        )


class Progress(NamedTuple):
    """Of one batch: the loss, and the share of its images that the model told right as they were
    trained on; NaN where the method saw none."""

    loss: float
    accuracy: float


class Updates:
    """Makes the steps that a method makes of each batch.

    The loss of a batch is the mean of the losses of its parts. Each process takes some of them, and
    each part has random numbers of its own; so the losses do not depend on how many processes there
    are.
    """

    def __init__(
        self,
        model: nn.Module,
        method: TrainingMethod,
        recipe: TrainRecipe,
        *,
        seed: int,
        steps: int,
        group: Processes,
    ) -> None:
        """steps: batches of the whole training."""
        self.model = model
        self.method = method
        self.recipe = recipe
        self.seed = seed
        self.group = group
        self.optimizers = {name: self._optimizer(name) for name in method.groups}
        self._rates = [recipe.rates(each, steps) for each in self.optimizers.values()]
        self._has_selection_bias = any(
            isinstance(module, WithSelectionBias) and module.selection_bias is not None
            for module in model.modules()
        )

    @property
    def rate(self) -> float:
        """The learning rate now, of the first optimizer."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    def make(
        self,
        images: Tensor,
        labels: Tensor,
        step: int,
        after_step: Callable[[], None] = lambda: None,
    ) -> Progress:
        """All steps of a batch (B, …), (B,). step: its number in the training; after_step: called
        after each step of an optimizer."""
        for set_rates in self._rates:
            set_rates(step)

        parts = range(self.group.rank, self.recipe.parts, self.group.world)
        images_of = images.tensor_split(self.recipe.parts)
        labels_of = labels.tensor_split(self.recipe.parts)
        updates = {
            part: self.method.updates(images_of[part], labels_of[part], slot=part) for part in parts
        }

        seen: list[Tensor] = []
        for number in range(self.method.updates_per_batch):
            self.model.zero_grad(set_to_none=True)
            start_global_batch(self.model)
            gradients = MeanGradients(self.model)
            of_parts: list[Tensor] = []
            for part, of_part in updates.items():
                update = self._next(of_part, step, number, part)
                update.loss.backward()
                gradients.add()
                of_parts.append(self._seen())
            gradients.put(self.method.parameters_of(update.group))
            self._step(update.group, step, of_parts, [images_of[part] for part in parts])
            after_step()
            seen += of_parts

        for part, of_part in updates.items():  # what a method does after its last step
            self._seed(step, self.method.updates_per_batch, part)
            next(of_part, None)
        loss, right, count = mean_over_processes(torch.stack(seen).mean(0)).tolist()
        return Progress(loss, right / count if count else float("nan"))

    def _next(self, updates: Iterator[Update], step: int, number: int, part: int) -> Update:
        self._seed(step, number, part)
        self.method.step = step
        return next(updates)

    def _seed(self, step: int, number: int, part: int) -> None:
        torch.manual_seed(mixed_seed(self.seed, step, number, part))

    def _seen(self) -> Tensor:
        """(3,) the loss of the last update; of its images, how many were right, and how many were
        seen."""
        last = self.method.last
        right = last.get("adversarial_correct", last.get("clean_correct"))
        loss = last["loss"].float()
        if right is None:
            return torch.stack([loss, torch.zeros_like(loss), torch.zeros_like(loss)])
        return torch.stack([loss, right.sum().to(loss), torch.full_like(loss, len(right))])

    def _step(self, group: str, step: int, seen: list[Tensor], images: list[Tensor]) -> None:
        """A step of the group's optimizer, whose weights have their gradients. seen, images: of the
        parts of the batch that this process takes.

        The host waits for the device here, once an update, so that weights never become NaN.
        """
        average_running_statistics(self.model)
        norm = clip_grad_norm_(self.model, self.recipe.clip_norm)

        loss = torch.stack(seen)[:, 0].mean()
        values = torch.stack([loss, norm.to(loss)]).tolist()
        if not math.isfinite(values[0]):
            layers = (self.method.non_finite_layer(each) for each in images)
            raise NonFiniteLoss(next(filter(None, layers), ""), step, values[0])
        if not math.isfinite(values[1]):
            raise NonFiniteGradient(self._first_bad_gradient(), step)

        self.optimizers[group].step()
        if self._has_selection_bias:
            update_selection_bias(self.model, all_processes=True)

    def _first_bad_gradient(self) -> str:
        """The name of a weight whose gradient is not finite."""
        return next(
            (
                name
                for name, weight in self.model.named_parameters()
                if weight.grad is not None and not bool(weight.grad.isfinite().all())
            ),
            "",
        )

    def _optimizer(self, group: str) -> torch.optim.Optimizer:
        # one call of the fused optimizer takes weights of one mesh, or of none
        of_mesh: dict[Any, list[nn.Parameter]] = {}
        for weight in self.method.parameters_of(group):
            of_mesh.setdefault(getattr(weight, "device_mesh", None), []).append(weight)
        return torch.optim.AdamW(
            [{"params": weights} for weights in of_mesh.values()],
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )


def mixed_seed(*numbers: int) -> int:
    """A seed for torch that differs from those of all other numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
