"""Accuracy under attacks that choose their own step size."""

from typing import Any

from torch import nn

from ironmoe.attacks import APGD
from ironmoe.attacks.attack import Attack
from ironmoe.attacks.registry import named_attacks
from ironmoe.bench.common.radii import exact, from_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers
from ironmoe.bench.study.measure.subject import Subject

SETTINGS = ("radius", "targeted_images", "apgd_steps", "targets", "seed")


@measurement(
    "apgd",
    "accuracy under APGD on the cross-entropy, and on the difference of logits for each of several "
    "target classes",
    settings=SETTINGS,
    passes=lambda budget: 0.8 * budget.targeted_images * budget.apgd_steps * (budget.targets + 1),
)
def apgd(subject: Subject, budget: Budget) -> Outcome:
    """Shares "apgd-ce@radius" and "apgd-t@radius"; per image whether it held. With fewer than four
    classes there is no targeted loss and so no second number."""
    classes = subject.logits(subject.images[:1], 1).shape[1]
    options: dict[str, Any] = {"steps": budget.apgd_steps, "seed": budget.seed}

    def by_cross_entropy(model: nn.Module) -> Attack:
        return APGD(model, from_255(budget.radius), loss="ce", **options)

    def targeted(model: nn.Module) -> Attack:
        named = named_attacks()["apgd-t"]
        settings = dict(named.settings) | {"targets": min(budget.targets, classes - 1)}
        return named.kind(model, from_255(budget.radius), **settings | options)

    attacks = {"apgd-ce": by_cross_entropy} | ({"apgd-t": targeted} if classes >= 4 else {})
    outcome = Outcome()
    for name, attack in attacks.items():
        summary = subject.attacked(attack, budget.targeted_images, budget)
        key, held = f"{name}@{exact(budget.radius)}", summary.robust.double()
        outcome += Outcome({key: float(held.mean())}, {key: numbers(held)})
    return outcome
