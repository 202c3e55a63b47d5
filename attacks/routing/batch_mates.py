"""Attack an image through the other images of its batch, where a capacity lets them take its
places.

"Buffer Overflow in Mixture of Experts" (Hayes, Shumailov & Yona, arXiv 2402.05526).
"""

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.balls.checked import checked_bounds, checked_eps, shown
from ironmoe.attacks.balls.elements import Bounds, is_by_image, largest
from ironmoe.attacks.engine.attacked_model import AttackedModel, Normalize
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.coupling import images_coupled, images_per_unit
from ironmoe.attacks.engine.inputs import check_images, in_units, prepared
from ironmoe.attacks.goals.labels import Untargeted
from ironmoe.attacks.routing.layers import routed_layers
from ironmoe.attacks.routing.mates_search import BatchMatesResult, MatesPlan, MatesSearch
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.routed_layers import RoutedLayer


class BatchMates:
    """Changes the class of a victim by perturbing only the other images of its group.

    Which choices of the victim's tokens find a place is piecewise constant in the mates' pixels, so
    there is no gradient from one image to another. The search ascends Σ wₑ pₑ in its place, over
    the tokens of all mates and the layers where images compete. pₑ is the probability that the
    router gives expert e. wₑ is the first-order loss of the victim's margin if its tokens had no
    place at e: Σ gate · ∂margin/∂gate over all choices of e, dropped ones included. So the mates
    crowd the experts that help the victim, and leave those that harm it. The search keeps the point
    where the model, as it is, gives the victim the lowest margin.

    Args:
        model: an nn.Module whose images influence each other, by a ``Capacity`` or Expert Choice.
        eps: Linf radius for the mates, in the units of ``bounds``: a number, or a tensor that
            broadcasts to an image, 0 where a pixel may not move.
        alpha: step length; None is 2.5 · eps / steps, at least eps / 10.
        steps: of each restart, ≥ 1.
        restarts: the first starts at the clean images, each further one at a random point.
        bounds, seed, normalize, logits_fn: as in ``Attack``.

    Raises:
        ValueError: an argument outside the above; a model whose images do not influence each other,
            or that is not differentiable.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float | Tensor = 8 / 255,
        alpha: float | None = None,
        steps: int = 40,
        restarts: int = 1,
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not images_coupled(model):
            raise ValueError(
                "model must let images influence each other, by a capacity or Expert Choice, got "
                f"{type(model).__name__} without: no batch mate can change an image's class there"
            )
        if alpha is not None and not alpha >= 0:
            raise ValueError(f"alpha must be at least 0 or None, got {alpha}")
        for name, value in {"steps": steps, "restarts": restarts}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

        self.model = model
        self.attacked_model = AttackedModel(model, normalize, logits_fn)
        self.layers = {name: site for name, site in routed_layers(model).items() if _competes(site)}
        self.eps = checked_eps(eps, infinite=False)
        self.steps = steps
        self.restarts = restarts
        self.bounds = checked_bounds(bounds, finite_for=None)
        self.seed = seed
        self.alpha = max(2.5 / steps, 0.1) * largest(self.eps) if alpha is None else alpha

    def run(
        self, images: Tensor, labels: Tensor, victim_positions: int | Sequence[int] = (-1,)
    ) -> BatchMatesResult:
        """Attack one image of each group after the other.

        Args:
            images: (N, …) floating point, finite, inside ``bounds``: groups side by side, as the
                model takes them.
            labels: (N,) int64.
            victim_positions: a place in a group, negative ones from its end, or several; each is
                attacked by itself, in every group that has it. By default the last, which is served
                last; without priority the first choices of a group's first image always find a
                place.
        """
        check_images(images, labels, self.bounds, Untargeted())
        for name, value in (("eps", self.eps), *(("bounds", bound) for bound in self.bounds)):
            if is_by_image(value, tuple(images.shape[1:])):
                raise ValueError(
                    f"{name} must be the same for all images, a number or a tensor that broadcasts "
                    f"to an image {tuple(images.shape[1:])}, got {shown(value)}"
                )
        group = images_per_unit(self.model, max(len(images), 1))
        positions = _places(victim_positions, group)
        self.attacked_model.image_dtype = images.dtype

        with borrowed(self.model):
            parts = [
                MatesSearch(self._plan(), chunk, size, position).result()
                for chunk, size in in_units(prepared(images, labels, None), group)
                if size > 1
                for position in _positions_in(size, positions)
            ]
        if not parts:
            raise ValueError(
                f"images must hold a victim that has mates, got {len(images)} images in groups of "
                f"{group} and victim_positions {positions}"
            )
        return _joined(parts)

    def _plan(self) -> MatesPlan:
        return MatesPlan(
            attacked_model=self.attacked_model,
            layers=self.layers,
            bounds=self.bounds,
            eps=self.eps,
            alpha=self.alpha,
            steps=self.steps,
            restarts=self.restarts,
            seed=self.seed,
        )


def _joined(parts: Sequence[BatchMatesResult]) -> BatchMatesResult:
    """The victims of all parts in one result; groups of a smaller size keep it, in a list."""
    columns = {
        name: [getattr(part, name) for part in parts]
        for name in BatchMatesResult.__dataclass_fields__
    }
    groups = [group for part in columns.pop("groups") for group in part]
    return BatchMatesResult(
        groups=groups, **{name: torch.cat(values) for name, values in columns.items()}
    )


def _competes(site: RoutedLayer) -> bool:
    """Whether tokens compete for places in this layer."""
    return isinstance(site.module, MoE) and (
        site.module.capacity is not None or isinstance(unwrapped(site.module.router), Grouped)
    )


def _places(positions: int | Sequence[int], group: int) -> list[int]:
    """The victims' places in a group of so many images, as the user gave them.

    Raises:
        TypeError: a place is no whole number.
        ValueError: a place lies outside the group or is given twice; or there is no victim, or no
            mate.
    """
    try:
        places = [
            index(position)
            for position in (positions if isinstance(positions, Iterable) else [positions])
        ]
    except TypeError:
        raise TypeError(
            f"victim_positions must be a whole number or several, got {positions!r}"
        ) from None

    for place in places:
        if not -group <= place < group:
            raise ValueError(f"victim_positions must be from {-group} to {group - 1}, got {place}")
    if len({place % group for place in places}) < len(places):
        raise ValueError(
            f"victim_positions must differ from each other in a group of {group}, got {places}"
        )
    if group == 1 or not places:
        raise ValueError(
            f"images must have mates, and some be victims, got groups of {group} and "
            f"victim_positions {places}"
        )
    return places


def _positions_in(size: int, places: Sequence[int]) -> list[int]:
    """The places that a group of this size has, from its beginning, each once."""
    return list(dict.fromkeys(place % size for place in places if -size <= place < size))
