"""Where an attack looks for adversarial examples: the norm, its radii and the box."""

import math

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import NORMS, Ball, ball_at, ball_of, norm_named
from ironmoe.attacks.balls.checked import checked_bounds, checked_eps, shown, warn_of_unit
from ironmoe.attacks.balls.elements import (
    Bound,
    Bounds,
    Region,
    SharedElements,
    box_at,
    is_by_image,
    largest,
    of_images,
    region_of,
)
from ironmoe.attacks.balls.grid import (
    SLACK,
    Grid,
    check_on_grid,
    grid_distance,
    grid_of,
    on_grid,
)
from ironmoe.attacks.engine.attempts import Attempts, where

# The ball of an attempt depends on these columns.
OF_BALL = ("clean", "eps", "eps_scale", "low_bound", "high_bound")


class _Norms:
    """The names of the registered norms that a class of attacks takes, looked up when asked."""

    def __get__(self, attack: "SearchSpace | None", kind: "type[SearchSpace]") -> tuple[str, ...]:
        return tuple(name for name, ball in NORMS.items() if kind.takes_ball(ball))


class SearchSpace:
    """The part of an attack that knows its norm, eps and bounds.

    Args:
        eps, norm, bounds, levels: as in ``Attack``.

    Raises:
        ValueError, TypeError: a norm, radius or box that this attack cannot take.
    """

    norms = _Norms()
    """The names of the norms that the attack takes: those that keep the promises that it ``needs``.
    It refuses every other norm."""

    needs: type[Ball] | tuple[type[Ball], ...] = Ball
    """The attack takes a norm whose ball is one of these classes. It must ask the ball for nothing
    that all of them do not promise."""

    needs_a_box = False
    """The attack works only within finite ``bounds``, and refuses others."""

    inside = True
    """Every point of the search lies in the ball; else eps may be infinite."""

    def __init__(self, eps: Bound, norm: str, bounds: Bounds, levels: int | None = None) -> None:
        given, norm = norm, norm_named(norm)
        if norm not in self.norms:
            raise ValueError(f"norm must be one of {self.norms}, got {given!r}")

        if levels is not None and not (isinstance(levels, int) and levels >= 2):
            raise ValueError(f"levels must be None or a whole number of at least 2, got {levels!r}")

        needs_faces = self.needs_a_box or ball_of(norm).needs_finite_bounds
        who = f"{type(self).__name__} in {norm}" if needs_faces else None
        who = who or (None if levels is None else f"levels={levels}")
        self.levels = levels
        self.bounds = checked_bounds(bounds, finite_for=who)
        self.eps = checked_eps(eps, infinite=not self.inside)
        self.norm = norm
        warn_of_unit(ball_of(norm), self.eps, self.bounds)
        self._elements = SharedElements()

    @property
    def largest_eps(self) -> float:
        """The largest radius of any element of any image."""
        return largest(self.eps)

    @property
    def eps_text(self) -> str:
        """eps as it is printed; of a tensor the shape and the largest element."""
        return shown(self.eps)

    @classmethod
    def takes_ball(cls, ball: type[Ball]) -> bool:
        """Whether the attack knows what to do in this norm."""
        return issubclass(ball, cls.needs)

    def region(self, images: Tensor) -> Region:
        """What eps and bounds mean for a batch of images (N, …).

        Raises:
            ValueError: a tensor that does not go with the images or with the norm.
        """
        return self._region((len(images), *images.shape[1:]))

    def check_grid(self, images: Tensor, bounds: Bounds | None = None) -> None:
        """ValueError: images (N, …) that do not lie on the grid of ``levels`` between ``bounds``,
        by default the attack's."""
        if self.levels is not None:
            box = box_at(images, self.bounds if bounds is None else bounds)
            check_on_grid(images, box, self.levels)

    def part_of(self, images: Tensor, first: int, count: int | None) -> tuple[Bounds, Region]:
        """(bounds, region) of some images of a data set.

        Args:
            images: (n, …), those with the numbers ``first`` … ``first`` + n − 1.
            count: how many there are in all; None: that is not known.

        Raises:
            ValueError: eps or bounds have one entry for each of another number of images, or the
                largest eps is not the same for all images.
        """
        shape = tuple(images.shape[1:])
        for name, value in (("eps", self.eps), *(("bounds", bound) for bound in self.bounds)):
            if is_by_image(value, shape) and isinstance(value, Tensor) and len(value) != count:
                raise ValueError(
                    f"{name} must be the same for all images, or have one entry for each of "
                    f"{'an unknown number of' if count is None else count} images, got "
                    f"{shown(value)}"
                )
        self._region((1 if count is None else count, *shape))

        places = slice(first, first + len(images))
        eps = of_images(self.eps, shape, places)
        low, high = (of_images(bound, shape, places) for bound in self.bounds)
        region = region_of(eps, (low, high), tuple(images.shape))
        if bool((region.radius != self.largest_eps).any()):
            raise ValueError(
                "eps must be the same for all images, or have the same largest element in every "
                "image of an evaluation, got "
                f"{shown(self.eps)}; attack.run takes other ones"
            )
        return (low, high), region

    def differs_by_image(self, images: Tensor) -> bool:
        """Whether eps or bounds have one entry for each image (…) of a data set."""
        shape = tuple(images.shape[1:])
        return any(is_by_image(value, shape) for value in (self.eps, *self.bounds))

    def counted(self, attempts: Attempts, point: Tensor) -> Tensor:
        """(R, …) what the model is asked and what counts where the search is at ``point``: with
        ``levels`` a grid point near it, else the point itself. It lies in the ball where
        ``point`` does."""
        if self.levels is None:
            return point

        radius = attempts["eps"]
        if not self.inside:
            beyond = self.ball(attempts).distance(point) > radius
            radius = radius.masked_fill(beyond, float("inf"))
        return on_grid(point, attempts["clean"], *self._on_grid(attempts, radius))

    def final(self, attempts: Attempts, point: Tensor) -> Tensor:
        """(R, …) the point that is predicted at the end: ``point`` if it lies in the ball, else one
        near it that does."""
        inside = self.ball(attempts).tighten(point)
        if self.levels is None:
            return inside

        clean = attempts["clean"]
        anywhere = torch.full_like(attempts["eps"], float("inf"))
        kept = on_grid(point, clean, *self._on_grid(attempts, anywhere))
        reached = self.distance(attempts, kept) <= attempts["eps"]
        place = self._on_grid(attempts, attempts["eps"])
        return where(reached, kept, on_grid(inside, clean, *place))

    def distance(self, attempts: Attempts, point: Tensor) -> Tensor:
        """(R,) float64 distance of what counts at ``point`` from the image."""
        if self.levels is None:
            return self.ball(attempts).distance(point)
        place = self._on_grid(attempts, attempts["eps"])
        return grid_distance(point, attempts["clean"], *place, attempts["eps"])

    def ball(self, attempts: Attempts) -> Ball:
        """Where the adversarial examples of these attempts may lie."""
        ball = ball_of(self.norm)
        kept = {name: attempts[name] for name in ball.kept if name in attempts}
        shared = self._elements.of(self.eps, self.bounds, attempts["clean"])
        return ball_at(ball, attempts, shared, kept)

    def _on_grid(self, attempts: Attempts, radius: Tensor) -> tuple[Ball, Grid]:
        """(float64 balls of these radii (R,) around the grid values of the images, the grid)."""
        assert self.levels is not None
        columns = {name: attempts[name] for name in OF_BALL if name in attempts}
        columns["eps"] = radius * (1 + SLACK)

        clean = columns["clean"].double()
        shared = self._elements.of(self.eps, self.bounds, clean)
        low = columns.get("low_bound", shared.low)
        high = columns.get("high_bound", shared.high)
        grid = grid_of((low, high), self.levels)
        columns["clean"] = grid.value(grid.nearest(clean))
        return self.ball(columns), grid

    def _region(self, shape: tuple[int, ...]) -> Region:
        region = region_of(self.eps, self.bounds, shape)
        warn_of_unit(ball_of(self.norm), self.eps, self.bounds, math.prod(shape[1:]))
        if region.by_element:
            ball_of(self.norm).scaled()
        return region
