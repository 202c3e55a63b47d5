"""What a norm is for an attack: a ball around each image, inside the image box, and a register of
the norms that there are.

A norm is one class in one file. It inherits from ``Ball``, which is all that PGD and FGSM ask, and
from those classes of ``abilities.py`` whose promises it keeps, which open the other attacks to it.
``register_norm`` makes its name known to every attack, to ``evaluate`` and to the command line.
Nothing here knows an attack by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from inspect import isabstract
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ironmoe.attacks.balls.elements import Bounds as Bounds
from ironmoe.attacks.balls.elements import Box, Shared


class Ball(ABC):
    """The points that an attack may use: a batch of B balls, each cut off at the image box.

    Everything is computed in the dtype of the centers, float32 or float64. A ball whose radius or
    box differs from element to element is of the class that ``scaled`` returns.

    Args:
        center: (B, …) the images, inside ``bounds``.
        eps: (B,) float64 radii; inf leaves the box alone.
        bounds: lowest and highest valid pixel.
    """

    norm: ClassVar[str]
    """The norm's name, as ``norm=`` and ``--norm`` take it."""

    kept: ClassVar[tuple[str, ...]] = ()
    """Names of further arguments of the constructor: tensors (B, …) that are worth keeping from one
    step to the next. ``edges`` gives their values."""

    needs_finite_bounds: ClassVar[bool] = False
    """Whether the ball has no meaning in a box without faces."""

    steps_come_back: ClassVar[bool] = False
    """Whether steps of one length often lead to exactly a point where the attempt has been."""

    usual_radii: ClassVar[tuple[float, ...]] = (2, 4, 8, 12, 16, 24)
    """The radii that the command line attacks with by default, in 1/255 of the pixel range."""

    usual_radius: ClassVar[float] = 8
    """The radius of most papers, in 1/255 of the pixel range: what the command line trains with by
    default."""

    def __init__(self, center: Tensor, eps: Tensor, bounds: Box) -> None:
        self.center = center
        self.eps = eps
        self.bounds = bounds

    def __getitem__(self, keep: Tensor) -> "Ball":
        """The ball of some of the examples."""
        return type(self)(self.center[keep], self.eps[keep], self.bounds)

    @classmethod
    def scaled(cls) -> "Callable[..., Ball]":
        """The class of balls of this norm with a radius of their own for each element.

        Raises:
            ValueError: the norm has none.
        """
        raise ValueError(
            f"eps and bounds must be the same for all elements in {cls.norm}, which has no balls "
            "with a radius for each, got tensors"
        )

    @classmethod
    def exceeds(cls, eps: float, low: float, high: float, elements: int | None = None) -> bool:
        """Whether no two points of a box are so far apart. Such a radius is in another unit than
        the pixels.

        elements: how many an image has; None: whatever that number is.
        """
        return False

    def edges(self) -> dict[str, Tensor]:
        """The tensors that ``kept`` names."""
        return {}

    free: Tensor | None = None
    """(B, …) bool, which elements may move; None: all."""

    @property
    def width(self) -> Any:
        """Highest minus lowest valid pixel: a number, or (B, …)."""
        return self.bounds[1] - self.bounds[0]

    @property
    def widest(self) -> Any:
        """The largest width of an element: a number, or (B,)."""
        return self.width

    @property
    def movable(self) -> int | Tensor:
        """How many elements of an image may move: a number, or (B,) int64."""
        return self.center[0].numel() if len(self.center) else 0

    def clip(self, point: Tensor) -> Tensor:
        """The nearest point of the box, with those elements as in the center that may not move."""
        return point.clamp(*self.bounds)

    def free_part(self, change: Tensor) -> Tensor:
        """``change`` (B, …), with 0 for elements that may not move."""
        return change if self.free is None else torch.where(self.free, change, 0)

    def in_pixels(self, units: Tensor) -> Tensor:
        """``units`` (B, …), changes of the elements relative to the scale of each, in pixels."""
        return units

    def in_units(self, change: Tensor) -> Tensor:
        """The opposite: pixels over the scale; 0 for elements that may not move."""
        return change

    @abstractmethod
    def project(self, point: Tensor) -> Tensor:
        """The nearest point, in the Euclidean sense, of ball and box."""

    def pull_in(self, point: Tensor) -> Tensor:
        """The nearest point of ball and box as the ball measures: in the Euclidean sense after
        each element is divided by its scale. After a steepest step this is the way back that
        leaves an optimum where it is."""
        return self.project(point)

    @abstractmethod
    def ascend(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        """A step of length ``alpha`` (B,), measured in the ball's norm, that raises a linear loss
        the most. The result is not projected."""

    def step(self, point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        """``pull_in(ascend(point, grad, alpha))``, outside autograd. A norm with a kernel on a GPU
        does both in one pass."""
        return self.pull_in(self.ascend(point, grad, alpha))

    @abstractmethod
    def random_point(self, keys: Tensor) -> Tensor:
        """A point drawn uniformly from the ball and projected onto the box; ``keys`` (B,) as
        ``example_keys`` gives them."""

    def reachable(self, inner: Tensor, outer: Tensor, wish: Tensor) -> Tensor:
        """(B, …) bool: the elements that may take ``outer`` instead of ``inner``, all of them at
        the same time.

        Args:
            inner: (B, …) in the ball.
            outer: (B, …) further away from the center, element by element, or as far.
            wish: (B, …) in [0, 1], how much an element should; below 0.5 it need not.
        """
        wanted = torch.where(wish >= 0.5, outer, inner)
        inside = self.distance(wanted) <= self.eps
        return inside.view(-1, *(1,) * (inner.ndim - 1)) & (wish >= 0.5)

    def tighten(self, point: Tensor) -> Tensor:
        """``point`` moved by rounding errors only, so that its float64 distance is at most eps. A
        norm whose projection may end outside by rounding writes its own."""
        return self.project(point)

    @abstractmethod
    def distance(self, point: Tensor) -> Tensor:
        """(B,) float64 distance from the center."""


NORMS: dict[str, type[Ball]] = {}
"""name → class, of every norm there is."""

AnyBall = TypeVar("AnyBall", bound=type[Ball])


def register_norm(ball: AnyBall) -> AnyBall:
    """A class decorator: from here on ``norm=ball.norm`` means this class. A class that is defined
    again, as in a notebook, takes the place of the former one.

    Raises:
        TypeError: the class is no complete ``Ball``, or its ``norm`` is no string.
        ValueError: another class has this name.
    """
    if not (isinstance(ball, type) and issubclass(ball, Ball)):
        raise TypeError(f"a registered norm must be a class of Ball, got {ball!r}")
    if isabstract(ball):
        missing = ", ".join(sorted(ball.__abstractmethods__))
        raise TypeError(f"{ball.__name__} must define every method of Ball, got none for {missing}")
    if not isinstance(getattr(ball, "norm", None), str):
        raise TypeError(
            f"{ball.__name__}.norm must be a string, got {getattr(ball, 'norm', None)!r}"
        )

    known = NORMS.get(ball.norm, ball)
    if (known.__module__, known.__qualname__) != (ball.__module__, ball.__qualname__):
        raise ValueError(f"norm must be a new name, got {ball.norm!r}, which {known.__name__} has")
    NORMS[ball.norm] = ball
    return ball


def norm_named(text: str) -> str:
    """The registered norm that a text means in any case, with or without its L: "linf", "inf",
    "l2"; the text itself where it means none."""
    if not isinstance(text, str):
        return text
    meant = text.lower().removeprefix("l").removeprefix("_")
    return next((name for name in NORMS if name.lower() in (text.lower(), f"l{meant}")), text)


def ball_of(norm: str) -> type[Ball]:
    """The class of a norm.

    Raises:
        ValueError: there is no norm of this name.
    """
    name = norm_named(norm)
    if not isinstance(name, str) or name not in NORMS:
        raise ValueError(f"norm must be one of {tuple(NORMS)}, got {norm!r}")
    return NORMS[name]


def ball_at(
    ball: type[Ball],
    columns: Mapping[str, Tensor],
    shared: Shared,
    kept: Mapping[str, Any] | None = None,
) -> Ball:
    """The balls around the images ``columns["clean"]`` (B, …), of radii ``columns["eps"]`` (B,).

    Args:
        columns: what each image has of its own of scale and bounds, too, as in ``Region.side``.
        shared: what all images have in common.
        kept: further arguments of the constructor.
    """
    scale = columns.get("eps_scale", shared.scale)
    low = columns.get("low_bound", shared.low)
    high = columns.get("high_bound", shared.high)
    place = columns["clean"], columns["eps"], (low, high)

    if scale is None and not isinstance(low, Tensor):
        return ball(*place, **(kept or {}))
    return ball.scaled()(*place, scale=scale, **(kept or {}))


def norms_with(ability: type) -> tuple[str, ...]:
    """The names of the norms whose balls have this ability."""
    return tuple(name for name, ball in NORMS.items() if issubclass(ball, ability))
