"""How fast the logits change around an image: norms of the Jacobian, and the distance at which
another class would win if the model were linear.

Shape suffixes: B images, C classes, R of them.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.abilities import HyperplaneBall
from ironmoe.attacks.balls.ball import ball_of, norms_with
from ironmoe.attacks.extra import Extra
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.smoothness.asking import asked_about, chunks
from ironmoe.attacks.smoothness.jacobians.lanczos import largest_singular_value
from ironmoe.attacks.smoothness.jacobians.linearised import (
    Linearised,
    largest_singular_values,
    linearised,
    twice_linearised,
)
from ironmoe.attacks.smoothness.jacobians.rival_classes import Rivals
from ironmoe.attacks.smoothness.labels import check_labels, right_classes
from ironmoe.attacks.smoothness.routing_held import check_routing
from ironmoe.attacks.smoothness.separate import measured


@dataclass(repr=False)
class LocalSmoothness:
    """The derivative of the logits z at B images. Everything is float64 but ``labels`` and
    ``passes``; how exact it is, the dtype of the model says: about 1e-6 in float32.

    logits:        (B, C)
    labels:        (B,) int64, the classes y whose margins these are
    spectral:      (B,) ‖J‖₂, the largest singular value of the Jacobian: how much the logits change
        at most, in L2, for a small step of length 1, in L2
    residual:      (B,) a singular value lies within this distance of ``spectral``; 0 where all rows
        of the Jacobian were computed. Otherwise ``spectral`` comes from below
    margins:       (B, C) z_y − z_j; 0 for j = y
    margin_slopes: (B, C) ‖∇(z_y − z_j)‖ in the dual norm: by how much the margin falls at most in a
        small step of length 1; 0 for j = y, NaN for classes that were not looked at
    radius:        (B,) min over j of margin / slope: the distance to the nearest other class if the
        model were linear (r₁). 0 where another class is not below y, inf where none can overtake
        it. Multiplying the logits by a number changes nothing. The minimum is taken over the
        classes that were looked at: where these are not all, r₁ is at most this
    rivals:        (B,) int64, how many classes j were looked at, those with the largest logits
    settled:       (B,) bool, no class that was not looked at can be nearer: by √2 ‖J‖₂, which no
        slope exceeds in L2, as far as ``spectral`` is right. True where all were looked at
    norm:          of the radius and of the steps that the slopes are about
    routing:       "free", "frozen" or "gates_frozen"
    passes:        (B,) int64, forward and backward passes that an image and its batch cost
    """

    logits: Tensor
    labels: Tensor
    spectral: Tensor
    residual: Tensor
    margins: Tensor
    margin_slopes: Tensor
    radius: Tensor
    rivals: Tensor
    settled: Tensor
    passes: Tensor
    norm: str
    routing: str

    @property
    def exact(self) -> bool:
        """Whether all classes of all images were looked at, so that nothing is an estimate."""
        return bool((self.rivals >= self.logits.shape[1] - 1).all())

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        if not len(self.radius):
            return "LocalSmoothness(0 images)"
        at_most = "" if self.settled.all() else "≤ "
        return (
            f"LocalSmoothness({len(self.radius)} images, median radius in {self.norm} "
            f"{at_most}{float(self.radius.median()):.3g}, median ‖J‖₂ "
            f"{float(self.spectral.median()):.3g}, routing {self.routing!r}"
            f"{'' if self.exact else ', estimated'})"
        )


class _Lanczos(NamedTuple):
    steps: int
    tolerance: float
    seed: int


def jacobian(
    model: Any,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    routing: str = "free",
    norm: str = "Linf",
    max_rows: int = 32,
    steps: int = 50,
    tolerance: float = 1e-4,
    seed: int = 0,
    batch_size: int = 64,
    extra: Extra | None = None,
) -> LocalSmoothness:
    """The derivative of a model's logits at images: its norm, the slopes of the margins, and the
    first-order radius r₁.

    A derivative knows nothing of jumps, where a token changes an expert: choices have no gradient,
    so "free" and "frozen" routing have one Jacobian. r₁ goes with robustness and overstates it,
    since models curve and reroute.

    Up to ``max_rows`` classes all C rows of the Jacobian are computed, one backward pass each over
    one graph, and everything is exact. Memory: ``batch_size`` · C images. With more classes
    ``spectral`` comes from Lanczos steps (Golub and Kahan), each of which costs two backward passes
    and needs a model that is differentiable twice. The rows are those of the label and of the
    ``max_rows`` − 1 largest other logits, and of up to as many again while one of them could still
    be nearer: a slope is at most √2 ‖J‖₂ in L2 and L1, and √(2 D) ‖J‖₂ in Linf, D pixels. If that
    is not enough, the radius is an upper estimate (``settled`` is False): a class that is far
    behind and steep may be nearer. ``max_rows=C`` is exact for every model.

    Args:
        model: any callable from images to logits, whose images do not influence each other; unless
            routing is "free", an nn.Module. That is measured in eval mode, its weights get no
            gradient, and it comes back as it was.
        x: (B, …) float32 or float64 images, as the model takes them. With model and images in
            float64 rounding vanishes: norms have 14 digits in place of 6.
        labels: (B,) int64, the right classes; None: those that the model names.
        routing: "free"; "frozen": each token keeps its experts; "gates_frozen": experts and gates
            are constants, so that what goes through gates is left out.
        norm: of the radius: "Linf", "L2", "L1".
        max_rows: as above, at least 2.
        steps, tolerance, seed: of the Lanczos steps: how many at most; at which residual over value
            they end; where they start.
        batch_size: images at a time.
        extra: further inputs of the model, one entry an image, as ``Attack.run`` takes them.

    Returns:
        ``LocalSmoothness``; of no image one with 0 classes.

    Raises:
        ValueError: images that influence each other; a norm, routing or number outside the above;
            logits that are not finite, or not differentiable with respect to the images; labels
            that are no class; a random model.
        TypeError: images, labels or logits that are none; a callable whose routing cannot be held.
    """
    ball = ball_with_dual(norm)
    check_counts(2, max_rows=max_rows)
    check_counts(1, steps=steps, batch_size=batch_size)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and above 0, got {tolerance}")
    check_routing(routing, model)
    asked, x = asked_about(model, x, extra)
    check_labels(labels, len(x))

    parts: list[dict[str, Tensor]] = []
    with measured(asked, x):
        for places in chunks(len(x), batch_size):
            part = asked.part(places)
            with linearised(part, x[places], routing) as at:
                own = right_classes(None if labels is None else labels[places], at.logits.detach())
                if at.logits.shape[1] <= max_rows:
                    parts.append(_by_rows(at, own, ball))
                else:
                    lanczos = _Lanczos(steps, tolerance, seed)
                    with twice_linearised(part, x[places], at.passes) as twice:
                        parts.append(_by_products(twice, own, ball, max_rows - 1, lanczos))

    first, *_ = parts = parts or [_of_no_image(x)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in first}
    return LocalSmoothness(**joined, norm=norm, routing=routing)


def ball_with_dual(norm: str) -> type[HyperplaneBall]:
    """The class of balls in this norm. ValueError: its dual norm is not known."""
    ball = ball_of(norm)
    if not issubclass(ball, HyperplaneBall):
        raise ValueError(
            f"norm must be one of {norms_with(HyperplaneBall)}, whose dual norm is known, got "
            f"{norm!r}"
        )
    return ball


def _by_rows(at: Linearised, labels: Tensor, ball: type[HyperplaneBall]) -> dict[str, Tensor]:
    """Exactly, by all rows."""
    rows = at.rows()
    images = torch.arange(len(rows), device=rows.device)
    own = rows[images, labels].double()
    slopes = [ball.dual_length(own - row.double()) for row in rows.unbind(1)]

    spectral = largest_singular_values(rows)
    found = Rivals(at.logits, labels)
    found.slopes = torch.stack(slopes, 1)
    return _part(at, labels, spectral, torch.zeros_like(spectral), found)


def _by_products(
    at: Linearised, labels: Tensor, ball: type[HyperplaneBall], rivals: int, lanczos: _Lanczos
) -> dict[str, Tensor]:
    """By products with the Jacobian, and by the rows of the nearest rivals: so many, and up to as
    many again for images where one of them could still win."""
    # one start for all images, so that an image's value does not depend on its place
    generator = torch.Generator().manual_seed(lanczos.seed)
    start = torch.randn(at.logits.shape[1], dtype=torch.float64, generator=generator)
    spectrum = largest_singular_value(
        lambda v: at.times(v.view_as(at.point)).double(),
        lambda u: at.transposed(u).double().flatten(1),
        start.to(at.logits.device).expand(len(at.logits), -1),
        at.point[0].numel(),
        steps=lanczos.steps,
        tolerance=lanczos.tolerance,
    )

    found = Rivals(at.logits, labels)
    found.steepest = _steepest(ball.norm, at.point[0].numel()) * (
        spectrum.value + spectrum.residual
    )
    own = at.row(labels).double()
    for number in range(min(2 * rivals, at.logits.shape[1] - 1)):
        looked_at = ~found.settled if number >= rivals else torch.ones_like(found.settled)
        if not bool(looked_at.any()):
            break
        rival = found.following[:, number]
        found.add(rival, ball.dual_length(own - at.row(rival).double()), looked_at)
    return _part(at, labels, spectrum.value, spectrum.residual, found)


def _steepest(norm: str, pixels: int) -> float:
    """What the slope of a margin does not exceed where ‖J‖₂ = 1: the dual norm of a difference of
    two rows, whose length in L2 is at most √2."""
    longest = {"Linf": math.sqrt(pixels), "L2": 1.0, "L1": 1.0}
    return math.sqrt(2) * longest.get(norm, math.inf)


def _part(
    at: Linearised, labels: Tensor, spectral: Tensor, residual: Tensor, found: Rivals
) -> dict[str, Tensor]:
    return {
        "logits": at.logits.detach().double(),
        "labels": labels,
        "spectral": spectral,
        "residual": residual,
        "margins": found.margins,
        "margin_slopes": found.slopes,
        "radius": found.radius,
        "rivals": found.count,
        "settled": found.settled,
        "passes": torch.full_like(labels, at.passes),
    }


def _of_no_image(x: Tensor) -> dict[str, Tensor]:
    nothing = torch.zeros(0, dtype=torch.float64, device=x.device)
    by_class, number = nothing.view(0, 0), nothing.long()
    return {
        "logits": by_class,
        "labels": number,
        "spectral": nothing,
        "residual": nothing,
        "margins": by_class,
        "margin_slopes": by_class,
        "radius": nothing,
        "rivals": number,
        "settled": nothing.bool(),
        "passes": number,
    }
