"""Attack an image through the other images of its batch, where a capacity lets them take its
places.

"Buffer Overflow in Mixture of Experts" (Hayes, Shumailov & Yona, arXiv 2402.05526).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.balls.ball import Bounds
from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.attacks.engine.attacked_model import AttackedModel, Normalize, check_images
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.coupling import images_coupled, images_per_unit
from ironmoe.attacks.engine.queue import Chunk
from ironmoe.attacks.engine.run import prepared, units
from ironmoe.attacks.losses import margin
from ironmoe.attacks.random import example_keys
from ironmoe.attacks.routing.layers import by_image, known_logits, members_of, routed_layers
from ironmoe.kernels import Routing
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routing.routed_layers import Decision, Site, attached


@dataclass
class BatchMatesResult:
    """What the other images of its group did to each of V victims, predicted again at the end in
    full precision.

    victims:           (V,) int64, which images
    clean_correct:     (V,) bool, classified as its label among the clean images
    prediction_before: (V,) int64, the class among the clean images; prediction: among the perturbed
        ones
    changed:           (V,) bool, the two differ, although the victim's own pixels are the same
    margin_before, margin: (V,), the victim's logit of ``prediction_before`` minus the best other
        one
    drops_before, drops: (V,) int64, how many choices of the victim's tokens find no place, over all
        layers
    noise_changed:     (V,) bool, one of as many random points of the same ball changes the class,
        too; noise_drops: (V,) int64, drops at the random point with the lowest margin
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


class BatchMates:
    """Changes the class of a victim by perturbing only the other images of its group.

    Which choices of the victim's tokens find a place is piecewise constant in the mates' pixels, so
    there is no gradient from one image to another. Ascended in its place is Σ wₑ pₑ over the tokens
    of all mates and the layers where images compete: pₑ is the probability that the router gives
    expert e, and wₑ the first-order loss of the victim's margin if its tokens had no place at e, Σ
    gate · ∂margin/∂gate over all choices of e, dropped ones included. Mates so crowd the experts
    that help the victim, and leave those that harm it. What counts is the victim's margin at each
    point, by the model as it is; the point with the lowest is kept.

    Args:
        model: an nn.Module whose images influence each other: a ``Capacity``, or Expert Choice.
        eps: Linf radius for the mates, in the units of ``bounds``.
        alpha: step length; None is 2.5 · eps / steps, at least eps / 10.
        steps: of each restart, ≥ 1.
        restarts: the first starts at the clean images, each further one at a random point.
        bounds, seed, normalize, logits_fn: as in ``Attack``.

    Raises:
        ValueError: an argument outside the above; a model whose images do not influence each other,
            or that is not differentiable.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 40,
        restarts: int = 1,
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not images_coupled(model):
            raise ValueError(
                "model must let images influence each other, by a capacity or Expert Choice, got "
                f"{type(model).__name__} without: "
                "no batch mate can change an image's class there"
            )
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        if alpha is not None and not alpha >= 0:
            raise ValueError(f"alpha must be at least 0 or None, got {alpha}")
        if not len(bounds) == 2 or not bounds[0] < bounds[1]:
            raise ValueError(
                f"bounds must be (lowest, highest) with lowest < highest, got {bounds}"
            )
        for name, value in {"steps": steps, "restarts": restarts}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.attacked_model = model, AttackedModel(model, normalize, logits_fn)
        self.layers = {name: site for name, site in routed_layers(model).items() if _competes(site)}
        self.eps, self.steps, self.restarts, self.bounds, self.seed = (
            eps,
            steps,
            restarts,
            bounds,
            seed,
        )
        self.alpha = max(2.5 / steps, 0.1) * eps if alpha is None else alpha

    def run(
        self, images: Tensor, labels: Tensor, victim_positions: int | Sequence[int] = (-1,)
    ) -> BatchMatesResult:
        """Attack one image of each group after the other.

        Args:
            images: (N, …) floating point, finite, inside ``bounds``: groups side by side, as the
                model takes them.
            labels: (N,) int64.
            victim_positions: a place in a group, negative ones from its end, or several; each is
                attacked by itself, in every group that has it. By default the last, which is served
                last; without priority the first choices of a group's first image always find a
                place.
        """
        check_images(images, labels, self.bounds)
        group = images_per_unit(self.model, max(len(images), 1))
        positions = _places(victim_positions, group)
        self.attacked_model.image_dtype = images.dtype
        with borrowed(self.model):
            parts = [
                _Search(self, chunk, size, position).result()
                for chunk, size in units(prepared(images, labels, None), group)
                if size > 1
                for position in dict.fromkeys(
                    place % size for place in positions if -size <= place < size
                )
            ]
        if not parts:
            raise ValueError(
                f"images must hold a victim that has mates, got {len(images)} images in groups of "
                f"{group} and victim_positions {positions}"
            )
        columns = {
            name: [getattr(part, name) for part in parts]
            for name in BatchMatesResult.__dataclass_fields__
        }
        groups = [one for part in columns.pop("groups") for one in part]
        return BatchMatesResult(
            groups=groups, **{name: torch.cat(values) for name, values in columns.items()}
        )


class _Look(NamedTuple):
    """What is seen of U groups of G images at a point.

    logits (U, C) of the victims; drops (U,), how many of their choices find no place; grad (U · G,
    …) of what is ascended
    """

    logits: Tensor
    drops: Tensor
    grad: Tensor | None


class _Search:
    """The victims at one position of U groups of G images, side by side."""

    def __init__(self, attack: BatchMates, chunk: Chunk, size: int, position: int) -> None:
        self.attack, self.chunk, self.size = attack, chunk, size
        count, device = len(chunk.labels), chunk.labels.device
        self.places = torch.arange(position, count, size, device=device)  # of the victims
        self.is_mate = torch.arange(count, device=device) % size != position
        eps = torch.full((count,), attack.eps, dtype=torch.float64, device=device)
        self.ball = LinfBall(chunk.images, eps, attack.bounds)
        self.alpha = torch.full_like(eps, attack.alpha)
        self.before = self.look(chunk.images)
        self.prediction = self.before.logits.argmax(1)
        classes = self.before.logits.shape[1]
        if int(chunk.labels.max()) >= classes:
            raise ValueError(
                f"labels must be below the model's {classes} classes, got {int(chunk.labels.max())}"
            )

    def result(self) -> BatchMatesResult:
        """Both searches, and the best point of the first predicted again in full precision."""
        point, noise = (self.worst(points) for points in (self.ascent(), self.noise()))
        logits = self.attack.attacked_model.predict(point)[self.places]
        after, at_noise = self.look(point), self.look(noise)
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
        """Every point of the search, and what is seen there."""
        for restart in range(self.attack.restarts):
            point = self.random_point(restart) if restart else self.chunk.images
            for _ in range(self.attack.steps):
                look = self.look(point, want_grad=True)
                yield point, look
                assert look.grad is not None
                point = where(
                    self.is_mate, self.ball.step(point, look.grad, self.alpha), self.chunk.images
                )
            yield point, self.look(point)

    def noise(self) -> Iterator[tuple[Tensor, _Look]]:
        """As many random points."""
        for draw in range(self.attack.restarts * (self.attack.steps + 1)):
            point = self.random_point(-1 - draw)
            yield point, self.look(point)

    def worst(self, points: Iterator[tuple[Tensor, _Look]]) -> Tensor:
        """(U · G, …) of each group the point where the victim's margin is lowest."""
        best, lowest = self.chunk.images, self.margin(self.before.logits)
        for point, look in points:
            margins = self.margin(look.logits)
            # less is rounding: the margin is piecewise constant
            better = margins < lowest - 1e-5 * (1 + lowest.abs())
            lowest = torch.where(better, margins, lowest)
            best = where(better.repeat_interleave(self.size), point, best)
        return best

    def margin(self, logits: Tensor) -> Tensor:
        """(U,) by how much the victims' first class leads."""
        return -margin(logits, self.prediction)

    def random_point(self, draw: int) -> Tensor:
        keys = example_keys(self.attack.seed, self.chunk.indices, draw)
        return where(self.is_mate, self.ball.random_point(keys), self.chunk.images)

    def look(self, point: Tensor, want_grad: bool = False) -> _Look:
        """One pass of the model as it is. For the gradient, choices without a place are carried out
        with a gate of 0: that changes nothing but rounding, and ∂margin/∂gate is known for them,
        too."""
        point = point.detach().requires_grad_(want_grad)
        choice: dict[str, Decision] = {}  # of each layer, while it runs
        intended: list[Decision] = []  # of each run of a layer
        probes: list[Tensor] = []  # zeros added to the gates, of which the margin is differentiated
        drops = [torch.zeros_like(self.places)]
        recording = True

        def choose(decision: Decision) -> Routing:
            choice[decision.layer] = decision
            return decision.routing

        def place(decision: Decision) -> Routing:
            probe = torch.zeros_like(decision.routing.gates, requires_grad=want_grad)
            before = choice.pop(decision.layer)
            if recording:
                experts_UNK = self.of_victims(decision.routing.experts, decision)
                drops.append((experts_UNK == decision.num_experts).sum((1, 2)))
                intended.append(before)
                probes.append(probe)
            return (
                Routing(decision.routing.gates + probe, before.routing.experts)
                if want_grad
                else decision.routing
            )

        layers, victim = self.attack.layers, self.attack.attacked_model
        full_precision = torch.autocast(point.device.type, enabled=False)
        chosen, placed = dict.fromkeys(layers, choose), dict.fromkeys(layers, place)
        with (
            torch.set_grad_enabled(want_grad),
            full_precision,
            attached(layers, chosen, {}, placed),
        ):
            logits = victim.logits(point)[self.places]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # with activation checkpointing the backward pass routes again, and must do so alike
            recording = False
            grad = self.gradient(point, logits, intended, probes) if want_grad else None
        return _Look(logits.detach(), torch.stack(drops).sum(0), grad)

    def gradient(
        self, point: Tensor, logits: Tensor, intended: list[Decision], probes: list[Tensor]
    ) -> Tensor:
        """(U · G, …) of what is ascended. A layer that does not reach the logits has no effect."""
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
        nothing = loss_UC.new_zeros(len(loss_UC), decision.num_experts + 1)  # the last: no choice
        weight_UE = nothing.scatter_add(1, experts_UC, loss_UC)[:, :-1]
        weight_UE = weight_UE / weight_UE.abs().sum(1, keepdim=True).clamp_min(
            torch.finfo(weight_UE.dtype).tiny
        )
        p_RNE = by_image(
            known_logits(decision).softmax(-1),
            len(self.is_mate),
            members_of(self.attack.layers[decision.layer]),
        )
        return (weight_UE.repeat_interleave(self.size, 0).unsqueeze(1) * p_RNE).sum()

    def of_victims(self, values: Tensor, decision: Decision) -> Tensor:
        """(U, N, …) of the victims' tokens, of all tokens (T, …)."""
        return by_image(values, len(self.is_mate), members_of(self.attack.layers[decision.layer]))[
            self.places
        ]


def _competes(site: Site) -> bool:
    """Whether tokens compete for places in this layer."""
    return isinstance(site.module, MoE) and (
        site.module.capacity is not None or isinstance(site.module.router, Grouped)
    )


def _places(positions: int | Sequence[int], group: int) -> list[int]:
    """Each victim's place in a group of so many images, as it was given; ValueError, TypeError:
    those that cannot be."""
    try:
        places = [
            index(position)
            for position in (positions if isinstance(positions, Iterable) else [positions])
        ]
    except TypeError:
        raise TypeError(
            f"victim_positions must be a whole number or several, got {positions!r}"
        ) from None
    for place in places:
        if not -group <= place < group:
            raise ValueError(f"victim_positions must be from {-group} to {group - 1}, got {place}")
    if len({place % group for place in places}) < len(places):
        raise ValueError(
            f"victim_positions must differ from each other in a group of {group}, got {places}"
        )
    if group == 1 or not places:
        raise ValueError(
            f"images must have mates, and some be victims, got groups of {group} and "
            f"victim_positions {places}"
        )
    return places
