"""Radii as people write them, whatever the norm, and in units of 1/255 of the pixel range.

The attacks know nothing of this unit. They take radii and give distances in units of the pixel
range, so every number that goes to them or comes from them is converted here.

How text is read: a fraction such as 8/255 is a share of the pixel range. Plain numbers of one
option have one unit. It is 1/255 of the range if one of them is 1 or larger. It is the whole range
if all are below 1 and one is below 0.1, since nobody attacks at less than 0.1/255; outside Linf, if
all are below 1. What is left, such as 0.5 alone in Linf, is asked back.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import TypeVar

from ironmoe.bench.common.user_error import UserError

PER_PIXEL_RANGE = 255
LEAST_255 = 0.1  # smaller radii change no 8-bit picture, and most likely are in another unit
HOW_READ = (
    "Numbers that are all below 1 are shares of the pixel range, others are steps of 255; a "
    "fraction such as 8/255 says its unit."
)
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
    parts = [part.strip() for part in eps.split(",")]
    try:
        found = tuple(sorted(set(_in_255(parts, norm, "--eps"))))
    except ValueError:
        raise UserError(
            f"--eps must be numbers separated by commas, such as {usual} or 4/255,8/255, got "
            f"{eps!r}"
        ) from None

    if not all(0 <= radius < float("inf") for radius in found):
        raise UserError(f"--eps must be finite and at least 0, got {eps!r}")
    from ironmoe.attacks.balls.ball import NORMS, Ball  # torch, which --help does without

    if NORMS.get(norm, Ball).exceeds(from_255(found[-1]), 0, 1):
        raise UserError(
            f"--eps is in units of 1/255 of the pixel range and at most 255 in {norm}, got {eps!r}"
        )
    return found


def one_radius(text: str, norm: str, option: str = "--eps") -> float:
    """The single radius that an option gives, in units of 1/255.

    Raises:
        UserError: it is no number, or its unit is not clear.
    """
    try:
        return _in_255([text.strip()], norm, option)[0]
    except ValueError:
        raise UserError(f"{option} must be a number, such as 8 or 8/255, got {text!r}") from None


def step_length(text: str | None) -> float | None:
    """The step length that ``--alpha`` gives, in units of 1/255, or None. A fraction, and a number
    below 0.1, are shares of the pixel range.

    Raises:
        UserError: it is no number above 0, or not finite.
    """
    if text is None:
        return None
    try:
        number = _number(text.strip())
    except ValueError:
        raise UserError(f"--alpha must be a number, such as 2 or 2/255, got {text!r}") from None
    if not 0 < number < float("inf"):
        raise UserError(f"--alpha must be finite and above 0, got {text}")
    is_share = "/" in text or float(number) < LEAST_255
    return float(number * PER_PIXEL_RANGE if is_share else number)


def told(radii_255: Iterable[float]) -> str:
    """Radii in both units: "4/255 = 0.0157, 8/255 = 0.0314"."""
    return ", ".join(f"{radius:.6g}/255 = {from_255(radius):.3g}" for radius in radii_255)


def questions(radii_255: Iterable[float], norm: str, alpha_255: float | None = None) -> list[str]:
    """What to ask back about ascending radii, and about a step length, that are most likely in
    another unit than meant."""
    radii = [radius for radius in radii_255 if radius > 0]
    return [*_about_eps(radii, norm), *_about_alpha(radii, alpha_255)]


def _about_alpha(radii: list[float], alpha_255: float | None) -> list[str]:
    """A step that is longer than the largest ball is wide ends at its far side, every time."""
    if alpha_255 is None or not radii or alpha_255 <= 2 * radii[-1]:
        return []
    return [
        f"Is --alpha what you mean? It was understood as {told([alpha_255])}. One step is longer "
        f"than the ball of eps = {told(radii[-1:])} is wide. {HOW_READ}"
    ]


def _about_eps(radii: list[float], norm: str) -> list[str]:
    from ironmoe.attacks.balls.ball import NORMS, Ball

    usual = NORMS.get(norm, Ball).usual_radii
    if radii and radii[0] < LEAST_255:
        small, why = radii[0], f"It is less than {LEAST_255} of a step of 8-bit pixels."
    elif radii and radii[-1] < usual[0] / 10:
        small, why = radii[-1], f"Usual in {norm} are {usual_radii(norm)}, in steps of 255."
    else:
        return []
    return [f"Is --eps what you mean? It was understood as {told([small])}. {why} {HOW_READ}"]


def _in_255(parts: Iterable[str], norm: str, option: str) -> list[float]:
    """The radii in units of 1/255, by the rule at the top. ValueError: a part is no number."""
    numbers = [(part, _number(part)) for part in parts]
    plain = [number for part, number in numbers if "/" not in part and number > 0]
    is_share = bool(plain) and max(plain) < 1
    if is_share and norm == "Linf" and float(min(plain)) >= LEAST_255:
        shown = exact(float(max(plain)))
        raise UserError(
            f"{option} must say its unit for numbers from {LEAST_255} to below 1, got {shown}: "
            f"write {shown}/255 for {shown} steps of 255, or {_share(float(max(plain)))}/255 for "
            f"{shown} of the pixel range"
        )
    return [
        float(number * PER_PIXEL_RANGE if "/" in part or is_share else number)
        for part, number in numbers
    ]


def _number(text: str) -> Fraction | float:
    """ValueError: it is neither a number nor a fraction of two. Fractions are exact: 8/255 of the
    range are 8.0 steps, not 8.000000000000002."""
    over, slash, under = text.partition("/")
    if not slash:
        return Fraction(over) if _is_finite(over) else float(over)
    if not (_is_finite(over) and _is_finite(under)) or not float(under):
        raise ValueError(text)
    return Fraction(over.strip()) / Fraction(under.strip())


def _is_finite(text: str) -> bool:
    return abs(float(text)) < float("inf")


def _share(number: float) -> str:
    """So many steps of 255 are this share of the range."""
    return f"{PER_PIXEL_RANGE * number:.6g}"


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
