"""The search of ``BatchMates``: the victims at one position of several groups, side by side.

``batch_mates`` says what is ascended, and why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import ball_at
from ironmoe.attacks.balls.elements import Bound, Bounds, SharedElements, largest
from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.losses import margin
from ironmoe.attacks.random import example_keys
from ironmoe.attacks.routing.layers import by_image, known_logits, members_of
from ironmoe.kernels import Routing
from ironmoe.moe.routing.callbacks import attached
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer

# A margin is piecewise constant in the mates' pixels. If it falls by less than this share, that is
# rounding.
MARGIN_ROUNDING = 1e-5


@dataclass
class BatchMatesResult:
    """What the other images of its group did to each of V victims, predicted again at the end in
    full precision.

    victims:           (V,) int64, which images
    clean_correct:     (V,) bool, classified as its label among the clean images
    prediction_before: (V,) int64, the class among the clean images
    prediction:        (V,) int64, the class among the perturbed ones
    changed:           (V,) bool, the two differ, although the victim's own pixels are the same
    margin_before:     (V,) the victim's logit of ``prediction_before`` minus the best other one,
                       among the clean images
    margin:            (V,) the same among the perturbed ones
    drops_before:      (V,) int64, how many choices of the victim's tokens find no place, over all
                       layers, among the clean images
    drops:             (V,) int64, the same among the perturbed ones
    noise_changed:     (V,) bool, one of as many random points of the same ball changes the class,
                       too
    noise_drops:       (V,) int64, drops at the random point with the lowest margin
    groups:            V tensors (G, …), each victim's group with the mates perturbed
    distance:          (V,) float64, the largest change of a mate's pixel, ≤ eps
    """

    victims: Tensor
    clean_correct: Tensor
    prediction_before: Tensor
    prediction: Tensor
    changed: Tensor
    margin_before: Tensor
    margin: Tensor
    drops_before: Tensor
    drops: Tensor
    noise_changed: Tensor
    noise_drops: Tensor
    groups: list[Tensor]
    distance: Tensor

    @property
    def success(self) -> Tensor:
        """(V,) bool: classified right among the clean images, and not among the perturbed ones."""
        return self.clean_correct & self.changed


@dataclass(frozen=True)
class MatesPlan:
    """What a search needs to know of its ``BatchMates``.

    layers: the routed layers where images compete for places, by name
    """

    attacked_model: AttackedModel
    layers: dict[str, RoutedLayer]
    bounds: Bounds
    eps: Bound
    alpha: float
    steps: int
    restarts: int
    seed: int


class _Look(NamedTuple):
    """What the model says about U groups of G images at a point.

    logits: (U, C) of the victims
    drops: (U,) int64, how many choices of the victims' tokens find no place
    grad: (U · G, …) the gradient that the search ascends; None if nobody asked for it
    """

    logits: Tensor
    drops: Tensor
    grad: Tensor | None


class MatesSearch:
    """The victims at one position of U groups of G images, side by side."""

    def __init__(self, plan: MatesPlan, chunk: Chunk, size: int, position: int) -> None:
        self.plan = plan
        self.chunk = chunk
        self.size = size

        count, device = len(chunk.labels), chunk.labels.device
        self.places = torch.arange(position, count, size, device=device)  # of the victims
        self.is_mate = torch.arange(count, device=device) % size != position
        eps = torch.full((count,), largest(plan.eps), dtype=torch.float64, device=device)
        shared = SharedElements().of(plan.eps, plan.bounds, chunk.images)
        self.ball = ball_at(LinfBall, {"clean": chunk.images, "eps": eps}, shared)
        self.alpha = torch.full_like(eps, plan.alpha)

        self.before = self.look(chunk.images)
        self.prediction = self.before.logits.argmax(1)
        self.plan.attacked_model.goal.check(self.before.logits, chunk.labels)

    def result(self) -> BatchMatesResult:
        """Both searches, and the best point of the first predicted again in full precision."""
        point = self.worst(self.ascent())
        noise = self.worst(self.noise())
        logits = self.plan.attacked_model.predict(point)[self.places]
        after = self.look(point)
        at_noise = self.look(noise)

        return BatchMatesResult(
            victims=self.chunk.indices[self.places],
            clean_correct=self.prediction == self.chunk.labels[self.places],
            prediction_before=self.prediction,
            prediction=logits.argmax(1),
            changed=logits.argmax(1) != self.prediction,
            margin_before=self.margin(self.before.logits),
            margin=self.margin(logits),
            drops_before=self.before.drops,
            drops=after.drops,
            noise_changed=at_noise.logits.argmax(1) != self.prediction,
            noise_drops=at_noise.drops,
            groups=list(point.unflatten(0, (-1, self.size))),
            distance=self.ball.distance(point).view(-1, self.size).amax(1),
        )

    def ascent(self) -> Iterator[tuple[Tensor, _Look]]:
        """Every point of the search, and what the model says there."""
        for restart in range(self.plan.restarts):
            point = self.random_point(restart) if restart else self.chunk.images
            for _ in range(self.plan.steps):
                look = self.look(point, want_grad=True)
                yield point, look
                assert look.grad is not None
                point = where(
                    self.is_mate, self.ball.step(point, look.grad, self.alpha), self.chunk.images
                )
            yield point, self.look(point)

    def noise(self) -> Iterator[tuple[Tensor, _Look]]:
        """As many random points as the search has points, to compare with."""
        for draw in range(self.plan.restarts * (self.plan.steps + 1)):
            point = self.random_point(-1 - draw)
            yield point, self.look(point)

    def worst(self, points: Iterator[tuple[Tensor, _Look]]) -> Tensor:
        """(U · G, …) for each group the point where the victim's margin is lowest."""
        best = self.chunk.images
        lowest = self.margin(self.before.logits)

        for point, look in points:
            margins = self.margin(look.logits)
            better = margins < lowest - MARGIN_ROUNDING * (1 + lowest.abs())
            lowest = torch.where(better, margins, lowest)
            best = where(better.repeat_interleave(self.size), point, best)
        return best

    def margin(self, logits: Tensor) -> Tensor:
        """(U,) by how much the victims' class among the clean images leads."""
        return -margin(logits, self.prediction)

    def random_point(self, draw: int) -> Tensor:
        keys = example_keys(self.plan.seed, self.chunk.indices, draw)
        return where(self.is_mate, self.ball.random_point(keys), self.chunk.images)

    def look(self, point: Tensor, want_grad: bool = False) -> _Look:
        """One pass of the model as it is. For the gradient, choices without a place are carried out
        with a gate of 0: that changes nothing but rounding, and ∂margin/∂gate is known for them,
        too."""
        point = point.detach().requires_grad_(want_grad)
        choice: dict[str, Decision] = {}  # what the router of a layer that runs has chosen
        intended: list[Decision] = []  # those choices of all runs of layers
        probes: list[Tensor] = []  # zeros added to the gates, to differentiate the margin by gates
        drops = [torch.zeros_like(self.places)]
        recording = True

        def choose(decision: Decision) -> Routing:
            choice[decision.layer] = decision
            return decision.routing

        def place(decision: Decision) -> Routing:
            probe = torch.zeros_like(decision.routing.gates, requires_grad=want_grad)
            before = choice.pop(decision.layer)
            if recording:
                dropped_TK = decision.routing.experts == decision.num_experts
                if decision.mask is not None:  # padding wants no place
                    dropped_TK = dropped_TK & decision.mask[:, None]
                drops.append(self.of_victims(dropped_TK, decision).sum((1, 2)))
                intended.append(before)
                probes.append(probe)
            return (
                Routing(decision.routing.gates + probe, before.routing.experts)
                if want_grad
                else decision.routing
            )

        layers = self.plan.layers
        full_precision = torch.autocast(point.device.type, enabled=False)
        chosen = dict.fromkeys(layers, choose)
        placed = dict.fromkeys(layers, place)
        with (
            torch.set_grad_enabled(want_grad),
            full_precision,
            attached(layers, chosen, {}, placed),
        ):
            logits = self.plan.attacked_model.logits(point)[self.places]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

            # With activation checkpointing the backward pass routes again. It must do so alike, and
            # nothing may be noted twice.
            recording = False
            grad = self.gradient(point, logits, intended, probes) if want_grad else None
        return _Look(logits.detach(), torch.stack(drops).sum(0), grad)

    def gradient(
        self, point: Tensor, logits: Tensor, intended: list[Decision], probes: list[Tensor]
    ) -> Tensor:
        """(U · G, …) the gradient of Σ wₑ pₑ. A layer that does not reach the logits adds nothing
        to it."""
        lead = self.margin(logits).sum()
        if not lead.requires_grad:
            raise ValueError(
                "model must be differentiable with respect to its gates, got logits without a graph"
            )

        effects = torch.autograd.grad(
            lead, probes, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        crowd = torch.stack(
            [
                self.crowd(decision, effect)
                for decision, effect in zip(intended, effects, strict=True)
            ]
        ).sum()

        if not crowd.requires_grad:
            raise ValueError(
                "model must be differentiable with respect to its images, got router logits "
                "without a graph"
            )
        return torch.autograd.grad(crowd, point)[0]

    def crowd(self, decision: Decision, effect_TK: Tensor) -> Tensor:
        """Σ wₑ pₑ over the tokens of each group, the wₑ of each victim scaled to a sum of absolute
        values of 1. The victim's own tokens count, too; its pixels do not move."""
        loss_UC = self.of_victims(decision.routing.gates.detach() * effect_TK, decision).flatten(1)
        experts_UC = self.of_victims(decision.routing.experts, decision).flatten(1).long()

        # The last column is that of no expert: there go the choices that are none.
        nothing = loss_UC.new_zeros(len(loss_UC), decision.num_experts + 1)
        weight_UE = nothing.scatter_add(1, experts_UC, loss_UC)[:, :-1]
        weight_UE = weight_UE / weight_UE.abs().sum(1, keepdim=True).clamp_min(
            torch.finfo(weight_UE.dtype).tiny
        )

        p_RNE = by_image(
            known_logits(decision).softmax(-1),
            len(self.is_mate),
            members_of(self.plan.layers[decision.layer]),
        )
        return (weight_UE.repeat_interleave(self.size, 0).unsqueeze(1) * p_RNE).sum()

    def of_victims(self, values: Tensor, decision: Decision) -> Tensor:
        """(U, N, …) the rows of the victims' tokens, out of ``values`` (T, …) of all tokens."""
        return by_image(values, len(self.is_mate), members_of(self.plan.layers[decision.layer]))[
            self.places
        ]
