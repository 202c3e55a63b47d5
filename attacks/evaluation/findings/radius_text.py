"""A radius as people write it."""

import numpy as np


def radius_text(eps: float) -> str:
    """The shortest text that stands for exactly this radius: "8/255", or "0.5"."""
    decimal = np.format_float_positional(eps, trim="-")
    numerator = np.format_float_positional(float(f"{255 * eps:g}"), trim="-")
    is_fraction = float(numerator) / 255 == eps and len(f"{numerator}/255") < len(decimal)
    return f"{numerator}/255" if is_fraction else decimal
