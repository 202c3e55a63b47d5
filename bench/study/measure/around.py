"""How smooth a model is around images: secants, curvature, and the least radius of an attack."""

import math
from functools import partial

import torch
from torch import Tensor

from ironmoe.attacks import FAB
from ironmoe.attacks.smoothness import (
    Swaps,
    local_linearity,
    nearest_swaps,
    slope_profile,
    stability,
)
from ironmoe.bench.common.radii import exact, from_255, to_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers, part
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe.distributed import RanksDisagreeError

SHARES = (1 / 64, 1 / 16, 1 / 4, 1)  # of the radius, at which secants are looked for


@measurement(
    "slopes",
    "the worst changes of the logits that PGD finds within radii, over the radius, with free and "
    "with frozen routing: flat where the model is smooth, 1 / r where it jumps",
    settings=("radius", "swap_images", "slope_steps", "seed"),
    passes=lambda budget: 12 * len(SHARES) * budget.swap_images * (budget.slope_steps + 2),
)
def slopes(subject: Subject, budget: Budget) -> Outcome:
    """ "slope@r:routing", the mean over images of the largest ‖f(x + d) − f(x)‖₂ / r over Linf
    ‖d‖ ≤ r, r in units of 1/255. A search finds points; the true slopes are larger. With free
    routing it begins beyond the nearest swap of each image, too, as far as the cheap look at pairs
    of neighbours tells it."""
    images, _ = subject.sample(budget.swap_images)
    swaps = _swaps(subject, images)
    outcome = Outcome()
    for routing in _routings(subject):
        outcome += part(routing, partial(_slopes, subject, budget, images, swaps, routing))
    return outcome


def _slopes(
    subject: Subject, budget: Budget, images: Tensor, swaps: Swaps | None, routing: str
) -> Outcome:
    radii = [share * budget.radius for share in SHARES]
    found = slope_profile(
        subject.model,
        images,
        [from_255(radius) for radius in radii],
        routing=routing,
        swaps=swaps,
        steps=budget.slope_steps,
        bounds=(0.0, 1.0),
        seed=budget.seed,
    )
    means = zip(radii, found.profile.mean(0).tolist(), strict=True)
    return Outcome({f"slope@{exact(radius)}:{routing}": mean for radius, mean in means})


def _routings(subject: Subject) -> tuple[str, ...]:
    return ("free", "frozen") if subject.layers else ("free",)


def _swaps(subject: Subject, images: Tensor) -> Swaps | None:
    """Where a search for jumps may begin; None for a model without experts, and where nobody can
    tell, as with Expert Choice."""
    if not subject.layers:
        return None
    try:
        return nearest_swaps(subject.model, images, pairs="next")
    except RanksDisagreeError:  # says nothing of the model
        raise
    except ValueError:
        return None


@measurement(
    "curvature",
    "how far the loss leaves its tangent within the radius (the local linearity measure γ), with "
    "free and with frozen routing",
    settings=("radius", "swap_images", "slope_steps", "seed"),
    passes=lambda budget: 10 * budget.swap_images * (budget.slope_steps + 1),
)
def curvature(subject: Subject, budget: Budget) -> Outcome:
    """Means over images: "gamma@r:free", "gamma@r:frozen", and "gamma@r:share" = 1 − the ratio of
    these means, the share of the curvature that comes from changes of routing. A dense model has
    the first alone."""
    swaps = _swaps(subject, subject.sample(budget.swap_images)[0])
    outcome = part("frozen", partial(_curvature, subject, budget, swaps, _routings(subject)))
    if outcome.problems:
        outcome += _curvature(subject, budget, swaps, ("free",))
    return outcome


def _curvature(
    subject: Subject, budget: Budget, swaps: Swaps | None, routings: tuple[str, ...]
) -> Outcome:
    images, labels = subject.sample(budget.swap_images)
    found = local_linearity(
        subject.model,
        images,
        labels,
        from_255(budget.radius),
        routings=routings,
        swaps=swaps,
        steps=budget.slope_steps,
        restarts=1,
        bounds=(0.0, 1.0),
        seed=budget.seed,
    )
    where = f"gamma@{exact(budget.radius)}"
    means = {routing: float(gamma.mean()) for routing, gamma in found.gamma.items()}
    values = {f"{where}:{routing}": mean for routing, mean in means.items()}
    if "frozen" in means:
        free = means["free"]
        values[f"{where}:share"] = 1 - means["frozen"] / free if free > 0 else math.nan
    return Outcome(values)


@measurement(
    "least radius",
    "the least radius at which FAB finds another class",
    settings=("local_images", "least_steps", "least_targets", "seed"),
    passes=lambda budget: 2.5 * budget.local_images * budget.least_steps * budget.least_targets,
)
def least_radius(subject: Subject, budget: Budget) -> Outcome:
    """The mean over images, "least_eps", of the least Linf distance to another class that was
    found, in units of 1/255; 0 of a wrong image; an image of which nothing was found counts as far
    away as an image can be, and "least_eps:unsolved" is the share of these. Of each image the same;
    NaN of a wrong one."""
    images, labels = subject.sample(budget.local_images)
    classes = subject.logits(images[:1], 1).shape[1]
    attack = FAB(
        subject.model,
        eps=math.inf,
        steps=budget.least_steps,
        targets=min(budget.least_targets, classes - 1),
        seed=budget.seed,
        early_stop=False,
    )
    found = stability(subject.model, images, labels, attack=attack)
    distances = to_255(found.distances.minimum(found.farthest))
    known: Tensor = distances.masked_fill(~found.right, torch.nan)
    return Outcome(
        {
            "least_eps": float(distances.mean()),
            "least_eps:unsolved": found.unsolved / len(labels),
        },
        {"least_eps": numbers(known)},
    )
