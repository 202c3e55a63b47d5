"""Local linearity: how far the loss leaves its tangent within a ball, and how much of that is
routing.

Shape suffixes: B images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.extra import Extra
from ironmoe.attacks.goals.goal import described
from ironmoe.attacks.losses import Loss, get_loss
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.model_errors import gradient
from ironmoe.attacks.smoothness.ascent import (
    FIRST_STEP,
    LATER_STEP,
    Surroundings,
    ascent,
    random_start,
    rounding_of,
    surroundings,
)
from ironmoe.attacks.smoothness.asking import Asked, asked_about, chunks, constant
from ironmoe.attacks.smoothness.labels import check_labels, right_classes
from ironmoe.attacks.smoothness.precision import coarsest_unit
from ironmoe.attacks.smoothness.routing_held import check_routing, held_routing, is_routed
from ironmoe.attacks.smoothness.separate import measured
from ironmoe.attacks.smoothness.swaps.nearest import Swaps
from ironmoe.attacks.smoothness.swaps.starts import SwapStarts, check_swaps, swap_starts


@dataclass(repr=False)
class LocalLinearity:
    """How far the loss of B images leaves its tangent. All are lower estimates: a search finds
    points, and no proof that there is none that is worse.

    gamma:    routing → (B,) float64, max |l(x + d) − l(x) − ⟨d, ∇l(x)⟩| over ‖d‖ ≤ eps
    rounding: (B,) float64, the same under the first routing after each pixel moved by one unit in
        the last place, in the lowest precision of images, weights and dispatched tokens. Values
        that are not far above it may be rounding. Casts in the code of a model do not show in it
    nearest_swap: (B,) float64, the distance of the swap at which the search of the free model
        began, too; inf without one, or if "free" was not measured; NaN where it could not be told,
        as ``SlopeProfile`` says
    eps, norm: as they were given
    """

    gamma: dict[str, Tensor]
    rounding: Tensor
    nearest_swap: Tensor
    eps: float
    norm: str

    @property
    def routing_share(self) -> Tensor:
        """(B,) 1 − γ frozen / γ free: the share of the curvature that comes from tokens which
        change their experts; 0 where both are equal, as in a dense model.

        It is no bound in either direction, since both γ are lower estimates. Each was also searched
        from the worst point of the other, so that neither is below its own value there. It is
        negative where changes of experts make the loss more linear.

        Raises:
            ValueError: one of the two was not measured.
        """
        missing = {"free", "frozen"} - set(self.gamma)
        if missing:
            raise ValueError(
                f'routings must hold "free" and "frozen" for a share, got {tuple(self.gamma)}'
            )
        free, frozen = self.gamma["free"], self.gamma["frozen"]
        return torch.where(free == frozen, 0.0, 1 - frozen / free)

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        medians = [
            f"{routing} {float(gamma.median()):.3g}"
            for routing, gamma in self.gamma.items()
            if len(gamma)
        ]
        return (
            f"LocalLinearity({len(self.rounding)} images, {self.norm} eps={self.eps:.4g}; median "
            f"{', '.join(medians) or 'of none'})"
        )


def local_linearity(
    model: Any,
    x: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: str = "Linf",
    loss: str | Loss = "ce",
    routings: Sequence[str] = ("free", "frozen"),
    swaps: Swaps | None = None,
    steps: int = 20,
    restarts: int = 2,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    extra: Extra | None = None,
) -> LocalLinearity:
    """The local linearity measure γ(eps) of Qin et al. (arXiv 1907.02610) under several routings,
    by steepest ascent from random points of the ball and, of the free model, from just beyond the
    nearest swap of each image, if eps reaches it.

    A large γ beside a small gradient is a sign that the gradient misleads attacks. Under "frozen"
    routing no token changes an expert, so what is missing there is the part of routing. After the
    searches of all routings each goes on from the worst points of the others. A model without
    routed layers is searched once.

    Costs (steps + 1) · (restarts + number of routings − 1) forward passes for each routing, a
    further attempt for the free one, and a backward pass for each step; and what ``nearest_swaps``
    costs, unless ``swaps`` are given.

    Args:
        model: an nn.Module from images to logits, whose images do not influence each other. It is
            measured in eval mode and comes back as it was. With ``routings=("free",)`` any
            callable; no routing is found in it, and so no swap.
        x: (B, …) float32 or float64 images.
        labels: (B,) int64 classes; a tensor (B, …) of whatever a loss of your own takes.
        eps: radius, finite and above 0, in the units of the images.
        norm: a registered norm, of d.
        loss: "ce", another name of ``ironmoe.attacks.losses``, or (logits, labels) → (B,). It is
            computed in float64.
        routings: which of ``ROUTINGS``; what is held is the routing of ``x``, and the tangent is
            that of the model as it is held.
        swaps: as in ``slope_profile``.
        steps: of each attempt, ≥ 0; restarts: attempts from random points, ≥ 1.
        bounds: lowest and highest valid pixel; None: any value is valid.
        seed: random points depend on it, on the number of the image and on the attempt alone; all
            routings begin at the same ones.
        batch_size: images at a time.
        extra: further inputs of the model, one entry an image, as ``Attack.run`` takes them.

    Returns:
        ``LocalLinearity``.

    Raises:
        ValueError: an argument outside the above; images that influence each other; logits that are
            not finite, or without a graph that leads to the images; labels that are no class; a
            random model.
        TypeError: images, labels, swaps or logits that are none; a callable whose routing cannot be
            held.
    """
    check_counts(0, steps=steps)
    check_counts(1, restarts=restarts, batch_size=batch_size)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be a finite number above 0, got {eps}")
    if isinstance(routings, str) or not isinstance(routings, Sequence) or not routings:
        raise ValueError(f"routings must be a sequence of at least one name, got {routings!r}")
    asked, x = asked_about(model, x, extra)
    for routing in routings:
        check_routing(routing, model, name="routings")
    _check_labels(labels, loss, len(x))
    check_swaps(swaps, len(x), norm)
    right = constant(labels)
    place = surroundings(norm, bounds, x)
    numbers = torch.arange(len(x), device=x.device)
    names = tuple(dict.fromkeys(routings if is_routed(model) else routings[:1]))

    found: list[dict[str, Tensor]] = []
    nothing = torch.zeros(0, dtype=torch.float64, device=x.device)
    rounding, nearest = [nothing], [nothing]
    with measured(asked, x):
        for places in chunks(len(x), batch_size):
            part, here, own = asked.part(places), x[places], right[places]
            if not callable(loss):
                with torch.no_grad():
                    own = right_classes(own, part(here))
            free = "free" if "free" in names else names[0]
            given = None if swaps is None or free != "free" else swaps.part(places)
            starts = swap_starts(part, here, norm, free, given)
            search = _Search(part, here, own, get_loss(loss), place, eps, starts)
            found.append(search.over(names, steps, restarts, seed, numbers[places]))
            rounding.append(search.rounding)
            nearest.append(starts.distance)

    gamma = {name: torch.cat([nothing, *(part[name] for part in found)]) for name in names}
    return LocalLinearity(
        gamma={routing: gamma.get(routing, gamma[names[0]]) for routing in routings},
        rounding=torch.cat(rounding),
        nearest_swap=torch.cat(nearest),
        eps=float(eps),
        norm=norm,
    )


def _check_labels(labels: Any, loss: str | Loss, count: int) -> None:
    """TypeError: they are no ``count`` classes, or for a loss of the caller's own no tensor with
    ``count`` entries."""
    if not callable(loss) and labels is not None:
        check_labels(labels, count)
        return
    if not isinstance(labels, Tensor) or not labels.ndim or len(labels) != count:
        raise TypeError(
            f"labels must be a tensor with one entry for each of {count} images, got "
            f"{described(labels)}"
        )


class _Search:
    """The worst points of one batch under several routings."""

    def __init__(
        self,
        asked: Asked,
        x: Tensor,
        labels: Tensor,
        loss: Loss,
        place: Surroundings,
        eps: float,
        starts: SwapStarts,
    ) -> None:
        self.asked = asked
        self.x = x
        self.labels = labels
        self.loss = loss
        self.ball = place.around(x, eps)
        self.eps = eps
        self.starts = starts
        self.rounding = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.largest: dict[str, Tensor] = {}
        self.worst: dict[str, Tensor] = {}

    def over(
        self, routings: Sequence[str], steps: int, restarts: int, seed: int, numbers: Tensor
    ) -> dict[str, Tensor]:
        """routing → γ (B,)."""
        starts = [random_start(self.ball, seed, numbers, attempt) for attempt in range(restarts)]
        for routing in routings:
            with held_routing(self.asked.model, self.x, routing, self.asked):
                departure = self._departure()
                self._follow(routing, departure, starts, steps)
                if routing == "free":
                    beyond = self._beyond_swap(departure)
                    self._follow(routing, departure, beyond, steps, first=LATER_STEP)
                if routing == routings[0]:
                    unit = coarsest_unit(self.asked.model, self.x.dtype)
                    self.rounding = rounding_of(departure, self.x, unit, seed, numbers)

        worst = dict(self.worst)
        for routing in routings:
            others = [worst[other] for other in routings if other != routing]
            if others:
                with held_routing(self.asked.model, self.x, routing, self.asked):
                    self._follow(routing, self._departure(), others, steps, first=LATER_STEP)
        return self.largest

    def _beyond_swap(self, departure: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """One start (B, …), of the points around the nearest swaps the worst of each image; none
        where eps reaches no swap."""
        best, most = self.x, torch.full_like(self.rounding, -1.0)
        for point in self.starts.points(self.x, self.ball, self.eps):
            with torch.no_grad():
                value = departure(point)
            best = where(value > most, point, best)
            most = most.maximum(value)
        return [] if bool((most < 0).all()) else [best]

    def _departure(self) -> Callable[[Tensor], Tensor]:
        """Points (B, …) → (B,) float64, how far the loss is from its tangent at ``x``."""
        leaf = self.x.clone().requires_grad_()
        at_x = self._loss(leaf)
        slope = gradient(at_x, leaf).double()
        height = at_x.detach()

        def departure(point: Tensor) -> Tensor:
            step = point.double() - self.x.double()
            return (self._loss(point) - height - (slope * step).flatten(1).sum(1)).abs()

        return departure

    def _loss(self, point: Tensor) -> Tensor:
        return self.loss(self.asked(point).double(), self.labels)

    def _follow(
        self,
        routing: str,
        departure: Callable[[Tensor], Tensor],
        starts: Sequence[Tensor],
        steps: int,
        first: float = FIRST_STEP,
    ) -> None:
        for start in starts:
            for point, value in ascent(self.ball, start, departure, steps, first=first):
                largest = self.largest.get(routing, torch.zeros_like(value))
                larger = value > largest
                self.largest[routing] = torch.where(larger, value, largest)
                self.worst[routing] = where(larger, point, self.worst.get(routing, self.x))
