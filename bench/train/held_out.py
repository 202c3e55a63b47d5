"""What the training images that were held out say of the weights after each epoch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.training import pgd
from ironmoe.attacks.training.guards.chance import against_chance
from ironmoe.bench.train.parallel import mean_over_processes
from ironmoe.moe import trace_routing

STEPS = 10
SEED = 0


class HeldOut(NamedTuple):
    """Shares of the held-out images that are right when they are clean and under PGD-10; of the
    clean images, the largest share of the load that an expert of each layer has.

    chance: how often the same answers would be right in random order. A model that gives one class
    to every image is right so often under any attack, too, and may look more robust than one that
    has begun to learn; learned: whether the clean share can be told from it.
    """

    clean: float
    robust: float
    load: dict[str, float]
    chance: float = 0.0
    learned: bool = True


class HeldOutRows:
    """The images (H, …) and labels (H,) that choose the weights, and the attack on them. together:
    how many images go through the model at once."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float,
        norm: str,
        dtype: torch.dtype | None,
        together: int,
    ) -> None:
        self.images = images
        self.labels = labels
        self.eps = eps
        self.norm = norm
        self.dtype = dtype
        self.together = together

    def measure(self, model: nn.Module) -> HeldOut:
        """Attack every image by PGD-10 at the full eps, from the same starting points each time.

        Each process does all of it, so that all of them, whose models may be parts of one model,
        take the same passes and choose the same weights.
        """
        training = model.training
        model.eval()
        try:
            return self._measure(model)
        finally:
            model.train(training)

    def _measure(self, model: nn.Module) -> HeldOut:
        with trace_routing(model) as trace:
            answers = self._answers(model, self.images)
        torch.manual_seed(SEED)
        attacked = torch.cat([self._attacked(model, *few) for few in self._batches()])
        clean = answers == self.labels
        right = clean & (self._answers(model, attacked) == self.labels)
        chance = against_chance(answers, self.labels)
        shares = torch.tensor(
            [clean.double().mean(), right.double().mean(), *chance],
            dtype=torch.float64,
            device=clean.device,
        )
        loads = {name: float(layer.load().max()) for name, layer in trace.layers.items()}
        clean_share, robust_share, chance_share, learned = mean_over_processes(shares).tolist()
        return HeldOut(clean_share, robust_share, loads, chance_share, learned > 0.5)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.together), self.labels.split(self.together), strict=True)

    def _attacked(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return pgd(
            model,
            images,
            labels,
            eps=self.eps,
            norm=self.norm,
            steps=STEPS,
            autocast_dtype=self.dtype,
        )

    @torch.no_grad()
    def _answers(self, model: nn.Module, images: Tensor) -> Tensor:
        """(H,) int64, a class for each image."""
        outputs = [model(few) for few in images.split(self.together)]
        logits = torch.cat([getattr(output, "logits", output) for output in outputs])
        return logits.argmax(1)
