"""How robust a trained model is: clean accuracy, PGD and targeted APGD on test images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, Proportion, evaluate
from ironmoe.attacks.registry import named_attacks
from ironmoe.bench.common.rows.found import is_count
from ironmoe.bench.data.in_memory import ImageData

TARGETED = "apgd-t"
PGD_STEPS = 20
MEASURES = {"clean": "clean", "pgd": f"PGD-{PGD_STEPS}", TARGETED: "APGD-T"}
"""Measure → its name in tables."""


class EvaluationSettings(NamedTuple):
    """eps: in units of the pixel range; pgd_images, apgd_images: how many test images each attack
    gets; apgd_steps: at each target. Clean accuracy is that of all test images."""

    eps: float = 0.1
    pgd_images: int = 500
    apgd_images: int = 200
    apgd_steps: int = 100
    batch_size: int = 250


def evaluated(model: nn.Module, data: ImageData, settings: EvaluationSettings) -> dict[str, Any]:
    """Accuracy by each of MEASURES, as numbers for JSON.

    Attacks search with a fixed seed, so two models of one data set meet the same random starts.
    """
    _, test = data.split()
    targeted = named_attacks()[TARGETED]
    options = dict(targeted.settings) | {"steps": settings.apgd_steps}
    options["targets"] = min(options["targets"], len(data.classes) - 1)
    attacks = {
        "pgd": (PGD(model, settings.eps, steps=PGD_STEPS), settings.pgd_images),
        TARGETED: (targeted.kind(model, settings.eps, **options), settings.apgd_images),
    }

    found = {"clean": _clean(model, data.images[test], data.labels[test], settings.batch_size)}
    for name, (attack, images) in attacks.items():
        chosen = test[:images]
        report = evaluate(
            model,
            (data.images[chosen], data.labels[chosen]),
            {name: attack},
            batch_size=settings.batch_size,
            checks=False,
        )
        found[name] = report.attacks[name].robust_accuracy.as_dict()
    return found


def is_accuracy(value: Any) -> bool:
    """Whether this can be an accuracy that was measured."""
    if not isinstance(value, dict) or not is_count(value.get("total")):
        return False
    count, total = value.get("count"), value["total"]
    if not isinstance(count, int) or not 0 <= count <= total:
        return False
    return bool(value.get("value") == Proportion(count, total).value)


@torch.no_grad()
def _clean(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> dict[str, Any]:
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return Proportion(correct, len(labels)).as_dict()
