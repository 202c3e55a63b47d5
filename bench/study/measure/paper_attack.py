"""The paper's attack (arXiv 2210.10253) over radii: errors, and how much the routing changes."""

import torch
from torch import Tensor

from ironmoe.attacks import PGD, attack_statistics
from ironmoe.attacks.routing.statistics import AttackStatistics
from ironmoe.bench.common.radii import exact, from_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe.metrics import READINGS

STEPS = 40  # the official code's
PIXELS = (0.0, 1.0)


@measurement(
    "paper",
    "over radii, accuracy, changed predictions and changed routing under PGD.vmoe with 40 steps, "
    "which leaves the pixel range; accuracy on its images cut off at the ends of the range; the "
    "routing also between a clean image and itself, and under random signs",
    settings=("radii", "paper_images", "seed"),
    passes=lambda budget: budget.paper_images * STEPS * len(budget.radii),
    version=3,
)
def paper(subject: Subject, budget: Budget) -> Outcome:
    """Accuracy "vmoe@r"; "vmoe@r:changed", predictions; "vmoe-clipped@r", accuracy on the same
    images cut off at the ends of the pixel range, which the official attack leaves;
    "routing@r:reading", 1 − mean IoU over layers, and "routing@r:reading:layer" of each. Two floors
    stand beside: "routing@0:reading", of the clean images against themselves, above 0 where a
    capacity drops tokens; and "routing noise@r:reading", of steps of full length in random
    directions, which leave the pixel range, too."""
    images, labels = subject.sample(budget.paper_images)
    values = _routing("routing@0", _statistics(subject, images, images, labels, budget))
    generator = torch.Generator().manual_seed(budget.seed)
    signs = torch.randint(0, 2, images.shape, generator=generator).to(images) * 2 - 1

    for radius in budget.radii:
        attack = PGD.vmoe(subject.model, from_255(radius), STEPS, bounds=PIXELS)
        batches = zip(*(t.split(budget.batch_size) for t in (images, labels)), strict=True)
        attacked = torch.cat([attack(*few) for few in batches])
        seen = _statistics(subject, images, attacked, labels, budget)
        where = f"vmoe@{exact(radius)}"
        values[where] = seen.correct[1] / seen.images
        values[f"{where}:changed"] = seen.changed / seen.images
        clipped = subject.logits(attacked.clamp(*PIXELS), budget.batch_size)
        right = clipped.argmax(1) == labels
        values[f"vmoe-clipped@{exact(radius)}"] = float(right.double().mean())
        values |= _routing(f"routing@{exact(radius)}", seen)
        noisy = images + from_255(radius) * signs
        floor = _statistics(subject, images, noisy, labels, budget)
        values |= _routing(f"routing noise@{exact(radius)}", floor)
    return Outcome(values)


def _statistics(
    subject: Subject, images: Tensor, other: Tensor, labels: Tensor, budget: Budget
) -> AttackStatistics:
    batches = zip(*(rows.split(budget.batch_size) for rows in (images, other, labels)), strict=True)
    return sum(
        (attack_statistics(subject.model, *batch) for batch in batches), start=AttackStatistics()
    )


def _routing(name: str, seen: AttackStatistics) -> dict[str, float]:
    """Of each reading the mean over layers, and each layer; nothing for a dense model."""
    values = {}
    for reading in READINGS:
        layers = seen.routing_change(reading)
        if layers:
            values[f"{name}:{reading}"] = sum(layers.values()) / len(layers)
        values |= {f"{name}:{reading}:{layer}": change for layer, change in layers.items()}
    return values
