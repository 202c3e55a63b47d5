"""What every attack shares: its inputs checked, the model borrowed, the result verified."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ironmoe.attacks.balls import BALLS, Ball, Bounds
from ironmoe.attacks.state import borrowed

Model = Callable[[Tensor], Tensor]


@dataclass
class AttackResult:
    """What an attack did to N examples. Every field is a tensor with N entries on the images' device.

    adversarial:   (N, …) float32 (float64 for float64 images); the clean image where it was misclassified already (but see PGD.vmoe)
    clean_correct: bool; the clean image is classified as its label
    success:       bool; clean_correct, and the final image was predicted again, as another class, at a distance ≤ eps
    prediction:    int64; the class of the final image
    distance:      float64; distance of the final image in the attack's norm
    forwards, backwards: int64; passes of the model this example took part in
    """

    adversarial: Tensor
    clean_correct: Tensor
    success: Tensor
    prediction: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor

    @property
    def robust(self) -> Tensor:
        """bool (N,): classified right, and no adversarial example was found."""
        return self.clean_correct & ~self.success


class Attack(ABC):
    """``attack(images, labels)`` gives adversarial images, ``attack.run(images, labels)`` an AttackResult.

    The model is any callable from images (B, …) to logits (B, C). While an attack runs, an nn.Module is in eval mode with
    frozen weights; all of its state comes back afterwards. Attacks work under ``no_grad`` and ``inference_mode``.

    Args:
        model: takes images in ``bounds``; any normalisation belongs inside it.
        eps: radius in the units of ``bounds``: a number, or a tensor (N,) with one radius an example.
        norm: "Linf" or "L2".
        bounds: lowest and highest valid pixel.
        seed: of the random starts. They depend on (seed, example index, restart) alone, not on batches.
        attack_dtype: run the search under autocast in this dtype; predictions that count stay in full precision.
    """

    whole_batch = False  # a subclass whose examples need their batch mates attacks misclassified ones along with the others

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        *,
        norm: str = "Linf",
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        attack_dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, from images to logits, got {type(model).__name__}")
        if norm not in BALLS:
            raise ValueError(f"norm must be one of {tuple(BALLS)}, got {norm!r}")
        if not len(bounds) == 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (lowest, highest) with lowest < highest, got {bounds}")
        radii = torch.as_tensor(eps, dtype=torch.float64)
        if not bool((radii >= 0).all()) or not bool(radii.isfinite().all()):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.model, self.eps, self.norm, self.bounds = model, eps, norm, bounds
        self.seed, self.attack_dtype = seed, attack_dtype

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (N, …) in ``bounds``, labels (N,) int64 → adversarial images, float32 (float64 for float64 images)."""
        return self.run(images, labels).adversarial

    def run(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> AttackResult:
        """Attack a batch.

        Args:
            images: (N, …) floating point, finite, inside ``bounds``.
            labels: (N,) int64, 0 … C − 1.
            indices: (N,) the examples' numbers in their data set, for their random numbers; by default 0 … N − 1.

        Raises:
            ValueError, TypeError: an input outside the above, or a model whose logits are not finite floats of shape (N, C).
        """
        self._check_inputs(images, labels, indices)
        with borrowed(self.model):
            self._input_dtype = images.dtype
            images, labels = _plain(images), _plain(labels)
            center = images.to(torch.promote_types(images.dtype, torch.float32))
            indices = torch.arange(len(images), device=images.device) if indices is None else _plain(indices).to(images.device)
            eps = torch.as_tensor(self.eps, dtype=torch.float64, device=images.device).expand(len(images))
            ball = self._ball(center, eps)

            clean_correct = self._predict(center, labels) == labels
            forwards, backwards = torch.ones_like(labels), torch.zeros_like(labels)
            adversarial = center.clone()
            attacked = (clean_correct | self.whole_batch).nonzero().squeeze(1)
            if len(attacked):
                adversarial[attacked], forwards_made, backwards_made = self._search(
                    ball[attacked], labels[attacked], indices[attacked]
                )
                forwards[attacked] += forwards_made
                backwards[attacked] += backwards_made

            prediction = self._predict(adversarial, labels)
            forwards += 1
            distance = ball.distance(adversarial)
            success = clean_correct & (prediction != labels) & (distance <= eps)
            return AttackResult(adversarial, clean_correct, success, prediction, distance, forwards, backwards)

    def _ball(self, center: Tensor, eps: Tensor) -> Ball:
        """Where the adversarial examples may lie."""
        return BALLS[self.norm](center, eps, self.bounds)

    @abstractmethod
    def _search(self, ball: Ball, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adversarial candidates for correctly classified centers (all, if ``whole_batch``): (points (N, …), forwards (N,), backwards (N,))."""

    def _logits(self, points: Tensor, labels: Tensor) -> Tensor:
        """The model on float32 (float64) points, as it would see them: in the dtype the user's images have. Checked."""
        logits = self.model(points.to(self._input_dtype))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(points) or not logits.is_floating_point():
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"model must return a float tensor of logits ({len(points)}, C), got {got}")
        if len(labels) and int(labels.max()) >= logits.shape[1]:
            raise ValueError(f"labels must be below the model's {logits.shape[1]} classes, got {int(labels.max())}")
        bad = logits.isnan().any(1)
        if bool(bad.any()):
            raise ValueError(
                f"model must return finite logits, got NaN for {int(bad.sum())} of {len(bad)} examples, first example {int(bad.nonzero()[0])}"
            )
        return logits

    @torch.no_grad()
    def _predict(self, points: Tensor, labels: Tensor) -> Tensor:
        """(N,) classes in full precision, also inside a user's autocast."""
        with torch.autocast(points.device.type, enabled=False):
            return self._logits(points, labels).argmax(1) if len(points) else torch.zeros_like(labels)

    def _check_inputs(self, images: Tensor, labels: Tensor, indices: Tensor | None) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
            got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating point tensor (N, …), got {got}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (len(images),):
            got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be an int64 tensor ({len(images)},), got {got}")
        if labels.device != images.device:
            raise ValueError(f"labels must be on {images.device} like images, got {labels.device}")
        if indices is not None and indices.shape != labels.shape:
            raise ValueError(f"indices must have shape ({len(images)},), got {tuple(indices.shape)}")
        if isinstance(self.eps, Tensor) and self.eps.ndim and self.eps.shape != labels.shape:
            raise ValueError(f"eps must be a number or have shape ({len(images)},), got shape {tuple(self.eps.shape)}")
        if len(images) == 0:
            return
        images = images.detach()
        if not bool(images.isfinite().all()):
            raise ValueError(f"images must be finite, got NaN or infinity first in example {_first(~images.isfinite())}")
        low, high = float(images.min()), float(images.max())
        if low < self.bounds[0] or high > self.bounds[1]:
            outside = (images < self.bounds[0]) | (images > self.bounds[1])
            raise ValueError(
                f"images must lie in bounds = {self.bounds}, got values from {low:.6g} to {high:.6g}, first in example {_first(outside)}"
            )
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be at least 0, got {int(labels.min())}")


def _first(mask: Tensor) -> int:
    return int(mask.flatten(1).any(1).nonzero()[0])


def _plain(tensor: Tensor) -> Tensor:
    """Detached; an inference tensor, which autograd refuses, becomes a copy that it takes."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
