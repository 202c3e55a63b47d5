"""Where the routing of a model jumps: how near the next swap of experts is, and what it does."""

from functools import partial

import torch

from ironmoe.attacks.smoothness import Swaps, boundary_profile, nearest_swaps, swap_jumps
from ironmoe.bench.common.radii import exact, from_255, to_255
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers, part
from ironmoe.bench.study.measure.subject import Subject

RADII = (0.1, 0.25, 1.0, 4.0)  # in units of 1/255


@measurement(
    "swaps",
    "the distance of images to the nearest change of an expert, over all pairs of experts, to "
    "first order, and the jump of the logits there, by two forced passes",
    settings=("swap_images",),
    # a backward pass for each token, layer and expert: about 16, 2 and 8 of them
    passes=lambda budget: 256 * budget.swap_images,
    needs_experts=True,
)
def swaps(subject: Subject, budget: Budget) -> Outcome:
    """ "swap", the median distance in Linf to the nearest swap of an image, in units of 1/255;
    "swap@r", the share of images with one within r; "swap@r:tokens", that of tokens; "jump", the
    mean L2 length of the jump of the logits at the swap, and "jump:largest". Of each image distance
    and jump; the jump is NaN where the image at the swap routes that token otherwise. Without swaps
    (K = E) the distance is NaN, the shares and jumps are 0."""
    images, _ = subject.sample(budget.swap_images)
    near = nearest_swaps(subject.model, images, pairs="all")
    shares = boundary_profile(near, [from_255(radius) for radius in RADII])

    distance = to_255(near.nearest)
    known = distance.masked_fill(distance.isinf(), torch.nan)
    values = {"swap": float(distance.median()) if distance.median().isfinite() else torch.nan}
    for radius, of_images, of_tokens in zip(
        RADII, shares.images.tolist(), shares.tokens.tolist(), strict=True
    ):
        values[f"swap@{exact(radius)}"] = of_images
        values[f"swap@{exact(radius)}:tokens"] = of_tokens
    of_distance = Outcome(values, {"swap": numbers(known)})
    return of_distance + part("jumps", partial(_jumps, subject, budget, near))


def _jumps(subject: Subject, budget: Budget, near: Swaps) -> Outcome:
    images, labels = subject.sample(budget.swap_images)
    at_swap = (images + near.steps).to(images)
    jumps = swap_jumps(subject.model, at_swap, near, labels=labels).logits
    values = {"jump": float(jumps.nanmean()), "jump:largest": float(jumps.nan_to_num().max())}
    return Outcome(values, {"jump": numbers(jumps)})
