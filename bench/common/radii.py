"""Radii as people write them: in units of 1/255 of the pixel range, whatever the norm.

The attacks know nothing of this unit. They take radii and give distances in units of the pixel
range, so every number that goes to them or comes from them is converted here.
"""

from collections.abc import Iterable
from typing import TypeVar

from ironmoe.bench.common.user_error import UserError

PER_PIXEL_RANGE = 255
USUAL_EPS = 8 / PER_PIXEL_RANGE  # of most papers in Linf, in units of the pixel range
Number = TypeVar("Number")  # a float or a tensor


def from_255(radius_255: float) -> float:
    """A radius in units of the pixel range, from one in units of 1/255."""
    return radius_255 / PER_PIXEL_RANGE


def all_from_255(radii_255: Iterable[float]) -> list[float]:
    """``from_255`` of each."""
    return [from_255(radius) for radius in radii_255]


def to_255(distance: Number) -> Number:
    """A distance in units of 1/255, from one in units of the pixel range."""
    return PER_PIXEL_RANGE * distance  # type: ignore[operator, return-value]


def exact(number: float) -> str:
    """The shortest text that stands for this number and for no other one."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def ascending_radii(eps: str | None, norm: str) -> tuple[float, ...]:
    """The radii that ``--eps`` lists, in ascending order, each once; None is the norm's default.

    Raises:
        UserError: ``eps`` holds something else than finite numbers that are at least 0.
    """
    usual = usual_radii(norm)
    eps = usual if eps is None else eps

    try:
        found = tuple(sorted({float(part) for part in eps.split(",")}))
    except ValueError:
        raise UserError(
            f"--eps must be numbers separated by commas, such as {usual}, got {eps!r}"
        ) from None

    if not all(0 <= radius < float("inf") for radius in found):
        raise UserError(f"--eps must be finite and at least 0, got {eps!r}")
    from ironmoe.attacks.balls.ball import NORMS, Ball  # torch, which --help does without

    if NORMS.get(norm, Ball).exceeds(from_255(found[-1]), 0, 1):
        raise UserError(
            f"--eps is in units of 1/255 of the pixel range and at most 255 in {norm}, got {eps!r}"
        )
    return found


def below_one(largest: float) -> str:
    """What to say of radii that are all below 1, which often were meant as shares of the range."""
    share = f"{from_255(largest):.3g}"
    return (
        f"--eps is in units of 1/255 of the pixel range: {largest:g} is {share} of it. For "
        f"{largest:g} of the range, give {255 * largest:g}."
    )


def usual_radii(norm: str) -> str:
    """The default of ``--eps`` in a norm."""
    from ironmoe.attacks.balls.ball import NORMS, Ball  # torch, which --help does without

    # A norm that does not exist is refused later, with a message of its own.
    ball = NORMS.get(norm, Ball)
    return ",".join(map(exact, ball.usual_radii))


def usual_radius(norm: str) -> float:
    """The default of ``--eps`` of a training in a norm."""
    from ironmoe.attacks.balls.ball import NORMS, Ball

    return NORMS.get(norm, Ball).usual_radius


def checked_alpha(alpha: float | None) -> float | None:
    """The step length that ``--alpha`` gives, or None.

    Raises:
        UserError: it is negative or not finite.
    """
    if alpha is not None and not 0 <= alpha < float("inf"):
        raise UserError(f"--alpha must be finite and at least 0, got {alpha}")
    return alpha
