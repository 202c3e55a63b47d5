"""eps and bounds as arguments of an attack: what is refused, and how they are printed."""

import math
import re
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.elements import Bound, Bounds, check_order, largest
from ironmoe.attacks.user_warning import warn_user

LEVELS = 255  # of an 8-bit picture
LEAST_LEVELS = 0.1  # a smaller radius is most likely in another unit
WIDE = 100  # boxes from here on are in levels, and not in shares of the range


def checked_eps(eps: Any, *, infinite: bool) -> Bound:
    """eps as a number or a tensor. A list or an array becomes a tensor.

    Args:
        infinite: eps may be infinite.

    Raises:
        TypeError: eps is neither.
        ValueError: an element is NaN or negative, or infinite where it may not be.
    """
    number = _checked_kind("eps", eps)
    values = torch.as_tensor(number, dtype=torch.float64)
    bad = ~(values >= 0) | (values.isinf() & (not infinite))
    if bool(bad.any()):
        wanted = "at least 0" if infinite else "finite and at least 0"
        raise ValueError(f"eps must be {wanted}, got {_first(values, bad)}")
    return number


def checked_bounds(bounds: Any, *, finite_for: str | None) -> Bounds:
    """bounds as a pair of numbers or tensors.

    Args:
        finite_for: who needs finite bounds; None: nobody.

    Raises:
        TypeError: bounds is no pair of these.
        ValueError: a lowest value is not below its highest one. Single elements of tensors may have
            both equal; such an element cannot move.
    """
    if not isinstance(bounds, tuple | list):
        raise TypeError(
            f"bounds must be (lowest, highest), two numbers or tensors, got {_shown_kind(bounds)}"
        )
    if len(bounds) != 2:
        raise ValueError(
            f"bounds must be (lowest, highest) with lowest < highest, got {tuple(bounds)}"
        )

    low, high = (_checked_kind("bounds", bound) for bound in bounds)
    lows, highs = (
        torch.as_tensor(bound, dtype=torch.float64, device="cpu") for bound in (low, high)
    )
    if finite_for and not bool(lows.isfinite().all() and highs.isfinite().all()):
        pair = bounds_text((low, high))
        raise ValueError(f"bounds must be finite for {finite_for}, got {pair}")

    # Tensors of other shapes are compared when the images show what they mean.
    if lows.shape == highs.shape or 0 in (lows.ndim, highs.ndim):
        check_order(lows, highs)
    return low, high


def warn_of_unit(ball: type[Ball], eps: Bound, bounds: Bounds, elements: int | None = None) -> None:
    """Warn of finite radii that all reach across the box, or that all are next to nothing in a wide
    one, and say how 8/255 is written. elements: how many an image has; where the norm asks for it,
    nothing is known before."""
    radius, low, high = _smallest(eps), _smallest(bounds[0]), largest(bounds[1])
    if elements is None:
        _warn_of_small(largest(eps), low, high)
    is_known_without = elements is not None and ball.exceeds(radius, low, high)
    if math.isinf(radius) or is_known_without or not ball.exceeds(radius, low, high, elements):
        return

    width = "" if high - low == 1 else f" * {high - low:g}"
    warn_user(
        f"eps={radius:g} reaches across bounds={bounds_text(bounds)}: every image is allowed. eps "
        f"is in the unit of the pixels; for {radius:g} of 255 levels write {radius:g}{width} / 255",
    )


def _warn_of_small(radius: float, low: float, high: float) -> None:
    """In a box as wide as 255, 8 / 255 is no eighth of a level."""
    level = (high - low) / LEVELS
    if not (WIDE <= high - low < math.inf and 0 < radius < LEAST_LEVELS * level):
        return
    warn_user(
        f"eps={radius:g} is {radius / level:.2g} of 255 levels in bounds=({low:g}, {high:g}), "
        "which changes no picture. eps is in the unit of the pixels; for 8 of 255 levels write "
        f"{8 * level:g}",
    )


def warn_of_step(ball: type[Ball], alpha: float | None, bounds: Bounds) -> None:
    """Warn of a step that crosses the box."""
    low, high = _smallest(bounds[0]), largest(bounds[1])
    if alpha is None or not ball.exceeds(alpha, low, high):
        return
    width = "" if high - low == 1 else f" * {high - low:g}"
    warn_user(
        f"alpha={alpha:g} crosses bounds={bounds_text(bounds)} in one step. alpha is in the unit "
        f"of the pixels; for {alpha:g} of 255 levels write {alpha:g}{width} / 255",
    )


def warn_of_normalize(normalize: Any, bounds: Bounds) -> None:
    """Warn of a mean that is no pixel of the box, or of one as for [0, 1] in a wide box."""
    if normalize is None:
        return
    mean, std = ([float(value) for value in values] for values in normalize)
    low, high = _smallest(bounds[0]), largest(bounds[1])
    is_outside = not all(low <= value <= high for value in mean)
    is_of_one = high - low >= WIDE and 0 < max(mean) < 1 and max(std) < 1
    if not (is_outside or is_of_one):
        return
    factor = "divide" if is_outside and high <= 1 else "multiply"
    warn_user(
        f"normalize has the mean {mean[0]:g}, and pixels lie in bounds={bounds_text(bounds)}. Mean "
        f"and std are in the unit of the pixels: {factor} both by 255 if they are those of the "
        "other unit",
    )


def _smallest(value: Bound) -> float:
    return -largest(-torch.as_tensor(value, dtype=torch.float64))


def shown(value: Bound) -> str:
    """A number as Python prints it, a tensor by its shape and largest element."""
    if not isinstance(value, Tensor):
        return f"{value}"
    if value.numel() == 1:
        return f"{float(value):.6g}"
    largest = f" up to {float(value.max()):.6g}" if value.numel() else ""
    return f"tensor {tuple(value.shape)}{largest}"


def bounds_text(bounds: Bounds) -> str:
    """The pair as errors print it."""
    return f"({', '.join(shown(bound) for bound in bounds)})"


def _checked_kind(name: str, value: Any) -> Bound:
    """TypeError: neither a number nor a tensor of numbers nor what makes one."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, Tensor):
        value = _as_tensor(name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(
            f"{name} must be numbers, got a tensor of {value.dtype}: write mask * radius for a mask"
        )
    return value


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a number or a tensor of numbers, got {_shown_kind(value)}"
        ) from None


def _shown_kind(value: Any) -> str:
    """What an error says of a value of the wrong kind; a quotient in a string is spelled out."""
    if not isinstance(value, str):
        return repr(value) if value is None else f"{type(value).__name__}"
    quotient = re.fullmatch(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*", value)
    hint = f"; write {quotient[1]} / {quotient[2]}" if quotient else ""
    return f"{value!r}{hint}"


def _first(values: Tensor, bad: Tensor) -> str:
    """The first bad element, and where it is."""
    if values.ndim == 0:
        return f"{float(values)}"
    place = tuple(bad.nonzero()[0].tolist())
    return f"{float(values[place]):.6g} at {list(place)}"
