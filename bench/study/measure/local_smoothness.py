"""How smooth a model is at the images themselves: its derivative."""

import torch
from torch import Tensor

from ironmoe.attacks.smoothness.jacobians.jacobian import jacobian
from ironmoe.attacks.smoothness.jacobians.matrix import network_terms
from ironmoe.bench.common.radii import to_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers, part
from ironmoe.bench.study.measure.subject import Subject

MOST_CLASSES = 32  # whose rows of the Jacobian are all computed


@measurement(
    "derivative",
    "the first-order radius r₁ in Linf, the spectral norm of the Jacobian of the logits, and the "
    "share of the Jacobian that goes through gates",
    settings=("local_images",),
    passes=lambda budget: 20 * budget.local_images,
    version=3,
)
def derivative(subject: Subject, budget: Budget) -> Outcome:
    """Means over images: "r1", in units of 1/255, at most as far as an image can be, 0 of a wrong
    image, so that all models are asked about the same ones; "jacobian", ‖J‖₂, which grows with the
    scale of the logits; "gate_share", ‖J − J with constant gates‖_F / ‖J‖_F, for a model with
    experts and at most MOST_CLASSES classes. Of each image the same; r₁ of a wrong one is NaN."""
    images, labels = subject.sample(budget.local_images)
    found = jacobian(subject.model, images, labels)
    right = found.logits.argmax(1) == labels
    farthest = images.maximum(1 - images).flatten(1).amax(1)  # infinite where logits are flat
    r1 = to_255(found.radius.minimum(farthest.to(found.radius)))

    outcome = Outcome(
        {"r1": float(r1.double().masked_fill(~right, 0).mean())},
        {"r1": numbers(r1.masked_fill(~right, torch.nan))},
    )
    outcome += _of_images("jacobian", found.spectral)
    if subject.layers and found.logits.shape[1] <= MOST_CLASSES:
        outcome += part("gate_share", lambda: _gate_share(subject, images))
    return outcome


def _gate_share(subject: Subject, images: Tensor) -> Outcome:
    return _of_images("gate_share", network_terms(subject.model, images).frobenius_share)


def _of_images(name: str, values: Tensor) -> Outcome:
    """The mean of those that are known, and each."""
    return Outcome({name: float(values.double().nanmean())}, {name: numbers(values)})
