"""A perturbation for all images, and what it does to images that it was not made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.engine.judging.finite import not_finite
from ironmoe.attacks.engine.judging.judge import Judge, Judgement
from ironmoe.attacks.engine.judging.passes import check_passes
from ironmoe.attacks.evaluation.proportion import Proportion
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.evaluation.source import Batches, Source
from ironmoe.attacks.random import example_keys, uniform


@dataclass
class UniversalReport:
    """What one perturbation does to N images; tensors (N,) on CPU, in the order of the data.

    clean_correct: bool, the model gives the clean image its label (a targeted search: not its
        target)
    fooled: bool, and the perturbed image not (a targeted search: it gives the target)
    fooled_by_noise: bool, the same for the perturbation with random signs, other ones for each
        image: noise of the same size in every pixel
    prediction: int64, the class of the perturbed image; −1 where the goal is about something else
    """

    clean_correct: Tensor
    fooled: Tensor
    fooled_by_noise: Tensor
    prediction: Tensor

    @property
    def clean_accuracy(self) -> Proportion:
        return _share(self.clean_correct, torch.ones_like(self.clean_correct))

    @property
    def accuracy(self) -> Proportion:
        """Of the perturbed images."""
        return _share(self.clean_correct & ~self.fooled, torch.ones_like(self.fooled))

    @property
    def fooling_rate(self) -> Proportion:
        """The share of fooled images, of those whose clean prediction is right."""
        return _share(self.fooled, self.clean_correct)

    @property
    def noise_rate(self) -> Proportion:
        """The same for noise of the same size."""
        return _share(self.fooled_by_noise, self.clean_correct)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "clean": self.clean_accuracy.as_dict(),
            "accuracy": self.accuracy.as_dict(),
            "fooling_rate": self.fooling_rate.as_dict(),
            "noise_rate": self.noise_rate.as_dict(),
        }

    def __str__(self) -> str:
        return f"fooled {self.fooling_rate}, by noise of the same size {self.noise_rate}"


def _share(some: Tensor, of: Tensor) -> Proportion:
    return Proportion(int((some & of).sum()), int(of.sum()))


@dataclass(repr=False)
class UniversalResult:
    """What ``UniversalPerturbation.fit`` found.

    perturbation: (…) of the shape of an image, in float32 (float64 for float64 images)
    distance: its length in the norm
    losses: the mean loss of each epoch, as the search raises it, before it is cut off
    forwards, backwards: passes of single images
    attack: it knows the model, the ball and the goal
    """

    perturbation: Tensor
    distance: float
    losses: list[float]
    forwards: int
    backwards: int
    attack: Attack

    def __repr__(self) -> str:
        return (
            f"UniversalResult({self.attack.norm}, distance={self.distance:.6g}, "
            f"shape={tuple(self.perturbation.shape)})"
        )

    def apply(self, images: Tensor) -> Tensor:
        """images (N, …) in ``bounds`` → the perturbed images, clamped to ``bounds``, in at least
        float32; none lies further from its image than eps."""
        shape = self.perturbation.shape
        if images.shape[-len(shape) :] != shape:
            raise ValueError(
                f"images must have the shape of the perturbation {tuple(shape)}, got "
                f"{tuple(images.shape)}"
            )

        wide = torch.promote_types(images.dtype, torch.float32)
        return self._added(images.detach().to(wide), self.perturbation)

    def evaluate(
        self, data: Batches, *, batch_size: int = 256, seed: int = 0, passes: int = 1
    ) -> UniversalReport:
        """What the perturbation does to images that it was not made of, beside noise of its size.

        Args:
            data: as ``evaluate`` takes it: (images, labels), or batches of them.
            batch_size: images asked about together.
            seed: of the noise.
            passes: how often the model is asked for each prediction: 1, or an even number of at
                least 16 for a random model.
        """
        check_passes(passes)
        judge = Judge(passes)
        parts = []
        with borrowed(self.attack.model):
            for chunk in Source(data, [self.attack], batch_size, 1, Shard()):
                signs = _random_signs(chunk, self.perturbation, seed)
                perturbed = self._judged(judge, chunk, self._added(chunk.images, self.perturbation))
                noisy = self._judged(
                    judge, chunk, self._added(chunk.images, signs * self.perturbation.to(signs))
                )
                right = ~self._judged(judge, chunk, chunk.images).reached
                columns = (
                    right,
                    right & perturbed.reached,
                    right & noisy.reached,
                    perturbed.prediction,
                )
                parts.append([column.cpu() for column in columns])
        if not parts:
            raise ValueError("data must hold at least one example, got none")
        return UniversalReport(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _added(self, images: Tensor, change: Tensor) -> Tensor:
        """The images (N, …) plus a change (…) or (N, …), inside ball and box."""
        columns = {"clean": images, "eps": self.attack.region(images).radius.to(images.device)}
        columns["eps"] = columns["eps"].expand(len(images))
        moved = self.attack.ball(columns).clip(images + change.to(images))
        return self.attack.final(columns, moved)

    def _judged(self, judge: Judge, chunk: Chunk, points: Tensor) -> Judgement:
        columns = {"label": chunk.labels, **chunk.side}
        judgement = judge(self.attack, points, columns)
        if bool(judgement.bad.any()):
            numbers = chunk.indices[judgement.bad].tolist()
            raise not_finite(numbers, len(points), "under one perturbation for all")
        self.attack.goal.check(judgement.outputs, chunk.labels)
        return judgement


def _random_signs(chunk: Chunk, like: Tensor, seed: int) -> Tensor:
    """(n, …) −1 or 1 for each pixel, by the number of the image."""
    keys = example_keys(seed, chunk.indices, 0)
    draws = uniform(keys, tuple(like.shape), chunk.images.dtype)
    return torch.where(draws < 0.5, -1.0, 1.0).to(chunk.images)
