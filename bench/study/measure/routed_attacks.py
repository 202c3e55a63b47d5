"""Attacks that know the routing: what of an attack's effect comes through which part of a model."""

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
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers
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
    "gradient flows through gates or experts alone; and under PGD on the free model if the routing "
    "of the clean image is replayed",
    settings=("radius", "routed_images", "steps", "seed"),
    passes=lambda budget: 0.9 * budget.routed_images * budget.steps * (len(MODES) + 1),
    needs_experts=True,
)
def routed_attacks(subject: Subject, budget: Budget) -> Outcome:
    """Shares "mode@radius"; "replayed@radius": the adversarial images of the free model, judged by
    the model with the routing that each clean image has."""
    outcome = Outcome()
    for name, mode in MODES.items():

        def attack(model: nn.Module, mode: type[RoutingMode] = mode) -> Attack:
            return PGD(
                model,
                from_255(budget.radius),
                steps=budget.steps,
                seed=budget.seed,
                routing=None if mode is RoutingMode else mode(),
            )

        summary = subject.attacked(attack, budget.routed_images, budget)
        key, held = f"{name}@{exact(budget.radius)}", summary.robust.double()
        outcome += Outcome({key: float(held.mean())}, {key: numbers(held)})

    replayed = _replayed(subject, budget).double()
    key = f"replayed@{exact(budget.radius)}"
    return outcome + Outcome({key: float(replayed.mean())}, {key: numbers(replayed)})


@torch.no_grad()
def _replayed(subject: Subject, budget: Budget) -> Tensor:
    """(N,) whether the model is right on adversarial images routed as the clean ones were."""
    images, labels = subject.sample(budget.routed_images)
    right = []
    rows = (images, subject.adversarial(budget), labels)
    for clean, attacked, targets in zip(*(t.split(budget.batch_size) for t in rows), strict=True):
        with trace_routing(subject.model) as trace:
            subject.model(clean)
        with intervene(subject.model, Replay(trace)):
            right.append(subject.model(attacked).argmax(1) == targets)
    return torch.cat(right)
