"""The model that is measured, with the images that it is asked about."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.attack import Attack
from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.bench.common.radii import from_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.moe.routing.routed_layers import RoutedLayer, routing_sites


class Subject:
    """A model in eval mode, and the test images of the study in an order that never changes: every
    model meets the same ones.

    model: from images (B, C, S, S) in [0, 1] to logits; images (N, C, S, S); labels (N,).
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model = model.eval()
        self.images = images
        self.labels = labels
        self._adversarial: dict[tuple[float, int], Tensor] = {}

    def sample(self, images: int) -> tuple[Tensor, Tensor]:
        """The first so many images and labels."""
        return self.images[:images], self.labels[:images]

    @cached_property
    def layers(self) -> dict[str, RoutedLayer]:
        """Name → routed layer; none in a dense model."""
        return routing_sites(self.model)

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int) -> Tensor:
        """(N, C) of these images."""
        return torch.cat([self.model(few) for few in images.split(batch_size)])

    def attacked(
        self,
        attack: Callable[[nn.Module], Attack],
        images: int,
        budget: Budget,
        radii: tuple[float, ...] | None = None,
        *,
        keep_adversarial: bool = False,
    ) -> AttackSummary:
        """What an attack does to the first so many images. radii: in units of 1/255; None: that of
        the attack."""
        report = evaluate(
            self.model,
            self.sample(images),
            {"attack": attack(self.model)},
            eps=None if radii is None else [from_255(radius) for radius in radii],
            batch_size=budget.batch_size,
            keep_adversarial=keep_adversarial,
            checks=False,
        )
        return report.attacks["attack"]

    def adversarial(self, budget: Budget) -> Tensor:
        """The first ``routed_images`` after PGD at ``radius``, of one run that several measurements
        share. An image that the model gets wrong is not moved."""
        key = (budget.radius, budget.routed_images)
        if key not in self._adversarial:
            summary = self.attacked(
                lambda model: PGD(
                    model,
                    from_255(budget.radius),
                    steps=budget.steps,
                    seed=budget.seed,
                    early_stop=False,
                ),
                budget.routed_images,
                budget,
                keep_adversarial=True,
            )
            assert summary.adversarial is not None
            self._adversarial[key] = summary.adversarial
        return self._adversarial[key]
