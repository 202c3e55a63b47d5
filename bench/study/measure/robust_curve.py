"""Accuracy on clean images and under PGD, over radii."""

import torch

from ironmoe.attacks import PGD
from ironmoe.bench.common.radii import exact, from_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers
from ironmoe.bench.study.measure.subject import Subject


@measurement(
    "clean",
    "accuracy and mean cross-entropy on clean images",
    settings=("clean_images",),
    passes=lambda budget: budget.clean_images / 2,
)
def clean(subject: Subject, budget: Budget) -> Outcome:
    """The share "clean"; "clean loss"; per image whether it is right, and its margin: the logit of
    its class minus the largest other one."""
    images, labels = subject.sample(budget.clean_images)
    logits = subject.logits(images, budget.batch_size).double()
    right = logits.argmax(1) == labels
    loss = torch.nn.functional.cross_entropy(logits, labels)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    margins = own.squeeze(1) - others.max(1).values
    return Outcome(
        {"clean": float(right.double().mean()), "clean loss": float(loss)},
        {"clean": numbers(right), "margin": numbers(margins)},
    )


@measurement(
    "curve",
    "accuracy under PGD with a random start, over radii, and the mean height of that curve",
    settings=("radii", "images", "steps", "seed"),
    passes=lambda budget: 0.7 * budget.images * budget.steps * len(budget.radii),
    version=2,
)
def curve(subject: Subject, budget: Budget) -> Outcome:
    """Shares "pgd@radius"; "auc", the mean height of the curve from the smallest radius to the
    largest, by trapezoids: the area under it, over its width. Of each image whether it held at each
    radius, and the same mean."""
    summary = subject.attacked(
        lambda model: PGD(model, from_255(budget.radii[-1]), steps=budget.steps, seed=budget.seed),
        budget.images,
        budget,
        budget.radii,
    )
    held = {exact(r): summary.robust_at(from_255(r)).double() for r in budget.radii}
    heights = torch.stack(list(held.values()))
    places = torch.tensor(budget.radii, dtype=torch.float64)
    width = float(places[-1] - places[0])
    areas = torch.trapezoid(heights, places, dim=0) / width if width else heights[0]
    images = {"auc": areas} | {f"pgd@{radius}": row for radius, row in held.items()}
    return Outcome(
        {name: float(row.mean()) for name, row in images.items()},
        {name: numbers(row) for name, row in images.items()},
    )
