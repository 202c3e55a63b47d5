"""Attacks that know the routing: what of an attack's effect comes through which part of a model."""

from functools import partial

import torch
from torch import Tensor, nn

from ironmoe.attacks import (
    PGD,
    AuxiliaryLoss,
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingMode,
)
from ironmoe.attacks.attack import Attack
from ironmoe.bench.common.radii import exact, from_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers, part
from ironmoe.bench.study.measure.steered import steered
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe import intervene, trace_routing
from ironmoe.moe.policies import Replay

MODES: dict[str, type[RoutingMode]] = {
    "free": RoutingMode,
    "auxiliary": AuxiliaryLoss,
    "frozen": FrozenRouting,
    "gates": GatesOnly,
    "experts": ExpertsOnly,
}
"""What the search sees of the model; the free model judges what it finds."""


@measurement(
    "routed attacks",
    "accuracy under PGD that also ascends the balance losses, that holds the routing, and whose "
    "gradient flows through gates or experts alone; what becomes of the images of PGD on the free "
    "model if they are routed as the clean ones were, and of clean images routed as these",
    settings=("radius", "routed_images", "steps", "seed"),
    passes=lambda budget: 0.9 * budget.routed_images * budget.steps * (len(MODES) + 1),
    needs_experts=True,
    version=2,
)
def routed_attacks(subject: Subject, budget: Budget) -> Outcome:
    """Shares "mode@radius". "replayed@radius": the adversarial images of the free model with the
    routing that each clean image has; "rerouted@radius": the clean images with the routing of the
    adversarial ones; both as ``steered`` has them."""
    outcome = Outcome()
    for name, mode in MODES.items():
        outcome += part(name, partial(_searched, subject, budget, name, mode))

    clean, _ = subject.sample(budget.routed_images)
    attacked = subject.adversarial(budget)
    for name, images, routed_as in (("replayed", attacked, clean), ("rerouted", clean, attacked)):
        outcome += part(name, partial(_crossed, subject, budget, name, images, routed_as))
    return outcome


def _searched(subject: Subject, budget: Budget, name: str, mode: type[RoutingMode]) -> Outcome:
    def attack(model: nn.Module) -> Attack:
        return PGD(
            model,
            from_255(budget.radius),
            steps=budget.steps,
            seed=budget.seed,
            routing=None if mode is RoutingMode else mode(),
        )

    summary = subject.attacked(attack, budget.routed_images, budget)
    key, held = f"{name}@{exact(budget.radius)}", summary.robust.double()
    return Outcome({key: float(held.mean())}, {key: numbers(held)})


def _crossed(
    subject: Subject, budget: Budget, name: str, images: Tensor, routed_as: Tensor
) -> Outcome:
    _, labels = subject.sample(budget.routed_images)
    own = subject.logits(images, budget.batch_size)
    logits = _routed_as(subject, images, routed_as, budget)
    return steered(f"{name}@{exact(budget.radius)}", logits, own, labels)


@torch.no_grad()
def _routed_as(subject: Subject, images: Tensor, others: Tensor, budget: Budget) -> Tensor:
    """(N, C) logits of images that are routed as the others are."""
    logits = []
    pairs = zip(*(rows.split(budget.batch_size) for rows in (images, others)), strict=True)
    for few, routed_as in pairs:
        with trace_routing(subject.model) as trace:
            subject.model(routed_as)
        with intervene(subject.model, Replay(trace)):
            logits.append(subject.model(few))
    return torch.cat(logits)
