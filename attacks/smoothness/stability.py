"""Class stability: how far images are, on average, from another class.

A Lipschitz constant means nothing for a model that jumps. The mean distance to the decision
boundary does, and the laws that relate smoothness to the number of parameters hold with it in place
of the constant (arXiv 2603.02806).

Shape suffixes: N images.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import LeastDistanceAttack
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.balls.elements import Bounds, box_at
from ironmoe.attacks.extra import Extra, cut, extra_columns
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.result import AttackResult
from ironmoe.attacks.smoothness.asking import asked_about, chunks, in_own_precision, measuring
from ironmoe.attacks.smoothness.labels import check_labels, right_classes
from ironmoe.attacks.smoothness.separate import measured

MOST_TARGETS = 9  # as many classes as FAB aims at in AutoAttack


@dataclass(repr=False)
class Stability:
    """How far each of N images is from another class, as far as an attack has found one.

    A distance that was found is never below the least one, since an attack proves nothing; the true
    stability is at most ``high``.

    distances: (N,) float64; 0 for an image that the model gets wrong without any change, inf where
        the attack found nothing
    right:     (N,) bool, the model names the image's label
    solved:    (N,) bool, the attack found another class
    farthest:  (N,) float64, distance of the farthest point of the bounds; inf without bounds
    norm:      of the distances
    attack:    what found them, as it prints
    """

    distances: Tensor
    right: Tensor
    solved: Tensor
    farthest: Tensor
    norm: str
    attack: str

    @property
    def unsolved(self) -> int:
        """How many images the attack left where they are, though the model gets them right."""
        return int((self.right & ~self.solved).sum())

    @property
    def mean(self) -> float:
        """The mean distance; inf if an image is unsolved. NaN of no image."""
        return float(self.distances.mean())

    @property
    def median(self) -> float:
        """The median distance, in which unsolved images are the farthest. NaN of no image."""
        ascending = self.distances.sort().values
        count = len(ascending)
        if not count:
            return math.nan
        return float(ascending[(count - 1) // 2] + ascending[count // 2]) / 2

    @property
    def low(self) -> float:
        """The mean distance if unsolved images count as 0."""
        return float(self.distances.where(self.distances.isfinite(), 0).mean())

    @property
    def high(self) -> float:
        """The mean distance if unsolved images count as far away as the bounds allow. Where the
        model names another class somewhere within the bounds, the true stability is not above
        it."""
        return float(self.distances.minimum(self.farthest).mean())

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        return (
            f"Stability({len(self.distances)} images, {int((~self.right).sum())} of them wrong, "
            f"{self.unsolved} unsolved; mean {self.norm} distance {self.low:.4g} … {self.high:.4g})"
        )


def stability(
    model: Any,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    norm: str = "Linf",
    bounds: Bounds = (0.0, 1.0),
    attack: LeastDistanceAttack | None = None,
    steps: int = 30,
    refine: int = 10,
    batch_size: int = 256,
    extra: Extra | None = None,
) -> Stability:
    """The distance of each image to the nearest other class, and its mean (Class stability, arXiv
    2603.02806).

    An attack for least distances finds a point of another class; bisection then looks for the first
    one on the way there. Multiplying the logits by a number changes nothing.

    Args:
        model: as for every attack; its images must not influence each other.
        images: (N, …) float32 or float64, inside the bounds.
        labels: (N,) int64; an image that the model gets wrong has distance 0. None: the classes
            that the model names, so that no image is wrong.
        norm, bounds: of the default attack; ``attack`` must have this norm and has bounds of its
            own.
        attack: FAB, DeepFool or another attack for least distances, on this model. With a finite
            eps, images whose other class is farther away are unsolved. None: FAB without a radius,
            on the nine likeliest classes.
        steps: of the default attack.
        refine: halvings of the way from the image to the point that was found, one forward pass
            each; none for a random model and for images of a grid (``levels``).
        batch_size: images at a time.
        extra: further inputs of the model, as ``Attack.run`` takes them.

    Returns:
        ``Stability``.

    Raises:
        ValueError: an attack on another model or in another norm; images that influence each other;
            a random model without an attack that is made for it; labels that are no class; what the
            attack itself refuses.
        TypeError: an attack that does not look for least distances; images or labels that are none.
    """
    check_counts(0, steps=steps, refine=refine)
    check_counts(1, batch_size=batch_size)
    _, images = asked_about(model, images, extra)
    check_labels(labels, len(images))
    if attack is None:
        attack = _usual_attack(model, images, labels, norm, bounds, steps, extra)
    _check_attack(attack, model, norm)

    with in_own_precision(model):
        parts = _found(attack, images, labels, batch_size, refine, extra)
    nothing = torch.zeros(0, dtype=torch.float64, device=images.device)
    parts = parts or [(nothing, nothing.bool(), nothing.bool())]
    distances, right, solved = (torch.cat(values) for values in zip(*parts, strict=True))
    farthest = _farthest(images, norm, attack.bounds)
    return Stability(distances, right, solved, farthest, norm, repr(attack))


def _found(
    attack: LeastDistanceAttack,
    images: Tensor,
    labels: Tensor | None,
    batch_size: int,
    refine: int,
    extra: Extra | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(distances, right, solved) of one batch after another."""
    parts = []
    for places in chunks(len(images), batch_size):
        here = images[places]
        side = cut(extra, len(images), places)
        own = _named(attack, here, side) if labels is None else labels[places]
        indices = torch.arange(len(images), device=images.device)[places]
        result = attack.run(here, own, indices, **({} if side is None else {"extra": side}))

        solved = result.clean_correct & result.success
        distances = result.distance.masked_fill(~solved, math.inf)
        if attack.levels is None and result.passes == 1:
            distances = distances * _first_share(attack, here, own, result, side, refine)
        distances = distances.masked_fill(~result.clean_correct, 0)
        parts.append((distances, result.clean_correct, solved))
    return parts


def _usual_attack(
    model: Any,
    images: Tensor,
    labels: Tensor | None,
    norm: str,
    bounds: Bounds,
    steps: int,
    extra: Extra | None,
) -> LeastDistanceAttack:
    """FAB-T on as many classes as there are, or nine, after a look at the model."""
    classes = MOST_TARGETS + 1
    if len(images):
        asked, images = asked_about(model, images, extra)
        with measured(asked, images), torch.no_grad():
            logits = asked.part(slice(0, 1))(images[:1])
        right_classes(labels, logits)
        classes = logits.shape[1]
    targets = min(MOST_TARGETS, max(classes - 1, 1))
    return FAB(
        model,
        math.inf,
        steps=steps,
        targets=targets,
        norm=norm,
        bounds=bounds,
        early_stop=False,
    )


def _check_attack(attack: Any, model: Any, norm: str) -> None:
    if not isinstance(attack, LeastDistanceAttack):
        raise TypeError(
            "attack must look for least distances, as FAB and DeepFool do, or be None, got "
            f"{type(attack).__name__}"
        )
    if attack.model is not model:
        raise ValueError(
            f"attack must be made for model, got one for another {type(attack.model).__name__}"
        )
    if attack.norm != norm:
        raise ValueError(f"attack must be in norm={norm!r}, got one in {attack.norm}")
    if attack.targeted:
        raise ValueError("attack must not be targeted: stability asks for any other class")


def _predicted(attack: LeastDistanceAttack, points: Tensor, side: Any) -> Tensor:
    """(B, C) logits as verdicts of the attack rest on."""
    with measuring(attack.model):
        attack.attacked_model.image_dtype = points.dtype
        return attack.attacked_model.predict(points, extra_columns(side, len(points)))


def _named(attack: LeastDistanceAttack, images: Tensor, side: Any) -> Tensor:
    """(B,) int64 the classes that the model names."""
    return attack.goal.prediction(_predicted(attack, images, side))


def _first_share(
    attack: LeastDistanceAttack,
    images: Tensor,
    labels: Tensor,
    result: AttackResult,
    side: Any,
    refine: int,
) -> Tensor:
    """(B,) float64, at which share of the way to the point that was found the class is another
    one already; 1 where none was found."""
    reached = torch.ones_like(result.distance)
    kept = torch.zeros_like(reached)
    for _ in range(refine):
        middle = (kept + reached) / 2
        shape = (-1, *(1,) * (images.ndim - 1))
        point = images.lerp(result.adversarial, middle.view(shape).to(images.dtype))
        fooled = attack.fooled(_predicted(attack, point, side), {"label": labels})
        reached = torch.where(fooled & result.success, middle, reached)
        kept = torch.where(fooled, kept, middle)
    return reached


def _farthest(images: Tensor, norm: str, bounds: Bounds) -> Tensor:
    """(N,) float64 distance of the farthest point within the bounds."""
    low, high = (torch.as_tensor(bound).to(images) for bound in box_at(images, bounds))
    corner = torch.where(images - low > high - images, low, high)
    anywhere = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.device)
    return ball_of(norm)(images, anywhere, (-math.inf, math.inf)).distance(corner)
