"""A radius as people write it, and the error of one that nobody attacked."""

from collections.abc import Sequence

import numpy as np


def check_radius(eps: float, radii: Sequence[float]) -> None:
    """ValueError that names the radii that were attacked: of another one nothing is known, because
    an attack at it might find more. TypeError: eps is no number."""
    if isinstance(eps, str):
        raise TypeError(f"eps must be a number, got {eps!r}; write 8 / 255 for 8 of 255 levels")
    if eps not in radii:
        known = ", ".join(map(radius_text, radii)) or "none that all attacks have"
        raise ValueError(
            f"eps must be one of the radii that were attacked ({known}), got {radius_text(eps)}"
        )


def radius_text(eps: float) -> str:
    """The shortest text that stands for exactly this radius: "8/255", or "0.5"."""
    decimal = np.format_float_positional(eps, trim="-")
    numerator = np.format_float_positional(float(f"{255 * eps:g}"), trim="-")
    is_fraction = float(numerator) / 255 == eps and len(f"{numerator}/255") < len(decimal)
    return f"{numerator}/255" if is_fraction else decimal
