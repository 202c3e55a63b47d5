"""The slope profile: how much the output changes within a radius, over that radius.

Of a smooth function it is flat for small radii, where it is the norm of the Jacobian. A jump makes
it rise as 1 / radius, since the change does not become smaller. A derivative sees no jump at all.
Beside it stands the worst secant, over all distances up to the radius.

Shape suffixes: B images, R radii, C classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.extra import Extra
from ironmoe.attacks.losses import margin
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.smoothness.ascent import rounding_of, surroundings
from ironmoe.attacks.smoothness.asking import Asked, asked_about, chunks, constant
from ironmoe.attacks.smoothness.labels import check_labels, right_classes
from ironmoe.attacks.smoothness.precision import coarsest_unit
from ironmoe.attacks.smoothness.routing_held import check_routing, held_routing
from ironmoe.attacks.smoothness.secant_search import Change, SecantSearch
from ironmoe.attacks.smoothness.separate import measured
from ironmoe.attacks.smoothness.swaps.nearest import Swaps
from ironmoe.attacks.smoothness.swaps.starts import check_swaps, swap_starts

OUTPUTS = ("logits", "margin")


@dataclass(repr=False)
class SlopeProfile:
    """The worst changes that were found around each of B images. All are lower estimates: a search
    finds points, and no proof that there is none that is worse.

    radii:    (R,) float64, ascending
    changes:  (B, R) float64, max ‖f(x + d) − f(x)‖ over ‖d‖ ≤ r
    slopes:   (B, R) float64, the worst secant, max ‖f(x + d) − f(x)‖ / ‖d‖ over 0 < ‖d‖ ≤ r. It
        does not fall with the radius, since the points of smaller balls count in larger ones. At a
        jump it is as steep as the jump is near
    rounding: (B,) float64, the change after each pixel moved by one unit in the last place, in the
        lowest precision of images, weights and dispatched tokens. Changes that are not far above it
        may be rounding, which looks like a jump. Casts in the code of a model do not show in it
    nearest_swap: (B,) float64, the distance of the swap at which the search began, too; inf without
        one, as under held routing; NaN where it could not be told, so that jumps were met by
        chance: another norm than Linf, L2, L1, or a layer that ``nearest_swaps`` refuses
    norm, out, routing: as they were given
    """

    radii: Tensor
    changes: Tensor
    slopes: Tensor
    rounding: Tensor
    nearest_swap: Tensor
    norm: str
    out: str
    routing: str

    @property
    def profile(self) -> Tensor:
        """(B, R) changes / radii: flat where f is smooth, 1 / r where it jumps. It is at most
        ``slopes``."""
        return self.changes / self.radii

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        medians = self.profile.median(0).values.tolist() if len(self.profile) else []
        pairs = zip(self.radii.tolist(), medians, strict=False)
        shown = ", ".join(f"{median:.3g} at {radius:.3g}" for radius, median in pairs)
        return (
            f"SlopeProfile({len(self.profile)} images, {self.out}, {self.routing} routing, "
            f"{self.norm}; median {shown or 'of none'}"
            f"{'; swaps not known' if self.nearest_swap.isnan().any() else ''})"
        )


def slope_profile(
    model: Any,
    x: Tensor,
    radii: Sequence[float],
    *,
    norm: str = "Linf",
    out: str = "logits",
    routing: str = "free",
    labels: Tensor | None = None,
    swaps: Swaps | None = None,
    steps: int = 20,
    restarts: int = 1,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    extra: Extra | None = None,
) -> SlopeProfile:
    """The worst change of the output within each radius, and the worst secant, by steepest ascent.

    The change is raised at each radius from random points of the ball, from the worst point so far,
    moved outwards, and from just beyond the nearest swap of the image, if the radius reaches it: an
    ascent alone meets jumps by chance. Then the secant is raised from where it is steepest so far.

    Costs at most (steps + 5) · (restarts + 3) forward passes for each radius, and a backward pass
    for each step; and what ``nearest_swaps`` costs, unless ``swaps`` are given. Float32 rounds
    changes at about 1e-6 of the logits, so small radii need a float64 model: ``rounding`` says how
    small. Secants are looked for at a sixteenth of the radius, too.

    Args:
        model: any callable from images to logits, whose images do not influence each other; unless
            routing is "free", an nn.Module. That is measured in eval mode and comes back as it was.
            In another callable no routing is found, and so no swap.
        x: (B, …) float32 or float64 images.
        radii: finite numbers above 0 in the units of the images, in any order.
        norm: a registered norm, of d.
        out: "logits": the Euclidean length of their change; "margin": the change of the right logit
            minus the best wrong one.
        routing: as in ``held_routing``; what is held is the routing of ``x``.
        labels: (B,) int64, the right classes of the margin; None: those that the model names.
        swaps: what ``nearest_swaps`` returned for these images in this norm, of all tokens or of
            some, for the free model alone; None: it is asked about all pairs of all tokens.
        steps: of each attempt, ≥ 0; restarts: attempts from random points at each radius, ≥ 1.
        bounds: lowest and highest valid pixel; None: any value is valid.
        seed: random points depend on it, on the number of the image and on the attempt alone.
        batch_size: images at a time.
        extra: further inputs of the model, one entry an image, as ``Attack.run`` takes them.

    Returns:
        ``SlopeProfile``.

    Raises:
        ValueError: an argument outside the above; images that influence each other; logits that are
            not finite, or without a graph that leads to the images; labels that are no class; a
            random model.
        TypeError: images, labels, swaps or logits that are none; a callable whose routing cannot be
            held.
    """
    check_counts(0, steps=steps)
    check_counts(1, restarts=restarts, batch_size=batch_size)
    check_routing(routing, model)
    if out not in OUTPUTS:
        raise ValueError(f"out must be one of {OUTPUTS}, got {out!r}")
    ascending = _checked_radii(radii)
    asked, x = asked_about(model, x, extra)
    check_labels(labels, len(x))
    check_swaps(swaps, len(x), norm)
    place = surroundings(norm, bounds, x)
    numbers = torch.arange(len(x), device=x.device)

    unit = coarsest_unit(model, x.dtype)

    parts = []
    with measured(asked, x):
        for places in chunks(len(x), batch_size):
            part, here = asked.part(places), x[places]
            right = None if labels is None else constant(labels)[places]
            given = None if swaps is None or routing != "free" else swaps.part(places)
            starts = swap_starts(part, here, norm, routing, given)
            with held_routing(model, here, routing, part):
                change = _change_of(part, here, out, right)
                search = SecantSearch(change, here, place, starts, seed, numbers[places])
                found = search.over(ascending, steps, restarts)
                rounding = rounding_of(change, here, unit, seed, numbers[places])
            parts.append((*found, rounding, starts.distance))

    nothing = torch.zeros(0, len(ascending), dtype=torch.float64, device=x.device)
    parts = parts or [(nothing, nothing, nothing[:, 0], nothing[:, 0])]
    changes, slopes, rounding, nearest = (torch.cat(values) for values in zip(*parts, strict=True))
    return SlopeProfile(
        radii=torch.tensor(ascending, dtype=torch.float64, device=x.device),
        changes=changes,
        slopes=slopes,
        rounding=rounding,
        nearest_swap=nearest,
        norm=norm,
        out=out,
        routing=routing,
    )


def _checked_radii(radii: Sequence[float]) -> list[float]:
    """The radii, ascending.

    Raises:
        TypeError: they are no sequence of numbers.
        ValueError: there is none, or one that is not finite and above 0.
    """
    is_scalar = isinstance(radii, Tensor) and radii.ndim == 0
    if not isinstance(radii, Iterable) or isinstance(radii, str) or is_scalar:
        raise TypeError(f"radii must be a sequence of numbers, got {radii!r}")
    numbers = sorted(float(radius) for radius in radii)
    if not numbers or not all(0 < radius < float("inf") for radius in numbers):
        raise ValueError(f"radii must be finite numbers above 0, at least one, got {radii}")
    return numbers


def _change_of(asked: Asked, x: Tensor, out: str, labels: Tensor | None) -> Change:
    """How far the output is from that at ``x``."""
    with torch.no_grad():
        logits = asked(x).double()
    right = right_classes(labels, logits)
    if out == "logits":
        return lambda point: (asked(point).double() - logits).norm(dim=1)

    before = margin(logits, right)
    return lambda point: (margin(asked(point).double(), right) - before).abs()
