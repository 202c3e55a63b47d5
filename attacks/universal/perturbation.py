"""One perturbation for all images (Moosavi-Dezfooli et al., arXiv 1610.08401), found by gradient
ascent over batches (Shafahi et al., arXiv 1811.11304, algorithm 1)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball, ball_at, ball_of
from ironmoe.attacks.balls.elements import Bounds, Shared
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.coupling import images_coupled
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.engine.judging.finite import not_finite
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.evaluation.source import Batches, Source
from ironmoe.attacks.extra import cut
from ironmoe.attacks.losses import Loss
from ironmoe.attacks.methods.pgd import PGD
from ironmoe.attacks.random import example_keys, mix
from ironmoe.attacks.universal.result import UniversalResult

# β of the paper, for cross-entropy.
USUAL_CLIP = 9.0


class UniversalPerturbation:
    """One change that fools a model on most images when it is added to them.

    ``fit`` goes through the data several times. For each batch it makes a step of steepest ascent
    on the mean loss of the perturbed images, with respect to the one perturbation, and projects
    that onto the ball. Images are clamped to ``bounds`` one by one. Each image's loss is cut off at
    ``clip``, so that images which are fooled already do not lead the search.

    The method is that of Shafahi et al., and not the original one, which adds up the DeepFool steps
    of single images: it needs no more than a loss, so that it serves every goal and norm, and each
    step looks at a whole batch.

    Args:
        model: takes images in ``bounds``; its images must not influence each other.
        eps: radius in the units of ``bounds``; a tensor that broadcasts to an image says how much
            each element may change, 0: not at all, as outside of a patch.
        epochs: how often the data is gone through, ≥ 1.
        alpha: length of the first step; steps get shorter from epoch to epoch, down to
            alpha / epochs. None: 2.5 · eps / epochs, but at least eps / 4.
        norm: a norm that PGD takes.
        loss: as for ``PGD``.
        clip: each image's loss is cut off here; None: 9 for cross-entropy, as in the paper, else
            nothing is cut off.
        bounds: lowest and highest valid pixel.
        seed: of the order of the images, where ``data`` are tensors.
        batch_size: images of a step.
        options: ``targeted``, ``goal``, ``eot``, ``normalize``, ``logits_fn``, ``attack_dtype`` and
            ``routing``, as for every attack. A targeted perturbation leads all images to their
            labels.

    Raises:
        ValueError, TypeError: an argument outside the above.
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        epochs: int = 10,
        alpha: float | None = None,
        norm: str = "Linf",
        loss: str | Loss | None = None,
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        clip: float | None = None,
        batch_size: int = 256,
        **options: Any,
    ) -> None:
        for name, value in {"epochs": epochs, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if images_coupled(model):
            raise ValueError(
                "model must judge each image by itself for one perturbation of all, got "
                f"{type(model).__name__}, whose images influence each other (a capacity or Expert "
                "Choice)"
            )
        self.attack = PGD(
            model,
            eps,
            alpha,
            steps=1,
            random_start=False,
            norm=norm,
            loss=loss,
            restarts=1,
            bounds=bounds,
            seed=seed,
            early_stop=False,
            **options,
        )
        goal = self.attack.goal
        is_cross_entropy = goal.has_classes and (loss or goal.usual_loss) == "ce"
        usual_clip = USUAL_CLIP if is_cross_entropy else math.inf

        self.model = model
        self.epochs = epochs
        self.alpha = alpha
        self.clip = usual_clip if clip is None else clip
        self.seed = seed
        self.batch_size = batch_size

    def __repr__(self) -> str:
        return (
            f"UniversalPerturbation({self.attack.norm}, eps={self.attack.eps_text}, "
            f"epochs={self.epochs}, seed={self.seed})"
        )

    def fit(self, data: Batches) -> UniversalResult:
        """Find the perturbation.

        Args:
            data: as ``evaluate`` takes it: (images (N, …), labels (N,)), or an iterable of such
                batches that can be gone through again and again, in the same order or another.

        Raises:
            ValueError, TypeError: data that are no such thing, or can be gone through only once;
                a model whose outputs are not finite, or that has no gradient.
        """
        if isinstance(data, Iterator) and self.epochs > 1:
            raise ValueError(
                f"data must be a collection, to be gone through {self.epochs} times, got "
                f"{type(data).__name__}, which can be gone through once"
            )
        attacked_model = self.attack.attacked_model
        before = attacked_model.forwards, attacked_model.backwards

        ball: Ball | None = None
        losses = []
        with borrowed(self.model):
            for epoch in range(self.epochs):
                total, count = 0.0, 0
                for chunk in self._chunks(data, epoch):
                    if self.attack.differs_by_image(chunk.images):
                        raise ValueError(
                            "eps must be the same for all images, as bounds must, for one "
                            f"perturbation of all, got {self.attack.eps_text}"
                        )
                    if ball is None:
                        ball = self._ball(chunk.images)
                        change = ball.center
                    loss, grad = self._loss_and_gradient(chunk, change)
                    change = ball.step(change, grad, self._step_length(ball, epoch))
                    total, count = total + loss, count + len(chunk.images)
                losses.append(total / max(count, 1))

        if ball is None:
            raise ValueError("data must hold at least one example, got none")
        change = ball.tighten(change)
        return UniversalResult(
            perturbation=change[0],
            distance=float(ball.distance(change)),
            losses=losses,
            forwards=attacked_model.forwards - before[0],
            backwards=attacked_model.backwards - before[1],
            attack=self.attack,
        )

    def _chunks(self, data: Batches, epoch: int) -> Iterator[Chunk]:
        """The data of one epoch. Tensors are shuffled, since images that lie beside each other may
        be of one class."""
        order: Tensor | None = None
        if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data[:2]):
            order = _order(len(data[0]), self.seed, epoch)
            data = tuple(_rearranged(part, order) for part in data)

        for chunk in Source(data, [self.attack], self.batch_size, 1, Shard()):
            if order is None:
                yield chunk
            else:
                yield chunk._replace(indices=order.to(chunk.indices.device)[chunk.indices])

    def _ball(self, images: Tensor) -> Ball:
        """Where the perturbation may lie, around 0: (1, …). Nothing is gained by a change of a
        pixel that is larger than its range."""
        region = self.attack.region(images)
        width = region.high - region.low
        place = {"clean": torch.zeros_like(images[:1]), "eps": region.radius.to(images.device)}
        return ball_at(ball_of(self.attack.norm), place, Shared(region.scale, -width, width))

    def _step_length(self, ball: Ball, epoch: int) -> Tensor:
        usual = max(2.5 / self.epochs, 0.25) * ball.eps
        first = usual if self.alpha is None else torch.full_like(ball.eps, self.alpha)
        return first * (1 - epoch / self.epochs)

    def _loss_and_gradient(self, chunk: Chunk, change: Tensor) -> tuple[float, Tensor]:
        """(the sum of the losses, (1, …) the gradient of the mean loss with respect to the
        change)."""
        images = chunk.images
        place = {"clean": images, "eps": self.attack.region(images).radius.to(images.device)}
        place["eps"] = place["eps"].expand(len(images))
        moved = images + change
        point = self.attack.ball(place).clip(moved)

        attempts = {
            "label": chunk.labels,
            "key": mix(chunk.indices),
            "point": point,
            **place,
            **chunk.side,
            **self.attack.attacked_model.record(images, chunk.side),
        }
        answer = self.attack.ask(attempts, True)
        assert answer.grad is not None
        self.attack.goal.check(answer.logits, chunk.labels)
        bad = self.attack.goal.bad(answer.logits) | ~answer.grad.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            raise not_finite(chunk.indices[bad].tolist(), len(images), "in the search")

        counts = (answer.loss < self.clip).view(-1, *(1,) * (images.ndim - 1))
        grad = torch.where(counts & (point == moved), answer.grad, 0)
        return float(answer.loss.sum()), grad.mean(0, keepdim=True)


def _order(count: int, seed: int, epoch: int) -> Tensor:
    """(N,) int64 the numbers of the images in the order of an epoch."""
    return example_keys(seed, torch.arange(count), epoch).argsort()


def _rearranged(part: Any, order: Tensor) -> Any:
    """Images, labels or further inputs in this order; what cannot be is left to be refused."""
    if isinstance(part, Tensor):
        return part[order.to(part.device)] if len(part) == len(order) else part
    return cut(part, len(order), order)
