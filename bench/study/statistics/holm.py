"""Holm's correction for several claims at once."""

from collections.abc import Mapping
from math import isnan, nan


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979, Scand. J. Stat. 6, 65–70).

    If everything at most α is called significant, the chance that any true hypothesis is among it
    is at most α, whatever the dependence between the tests.

    Args:
        p_values: by name. NaN: was not tested, which stays NaN and does not count as a test.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    outside = {name: p for name, p in p_values.items() if not isnan(p) and not 0 <= p <= 1}
    if outside:
        raise ValueError(f"p_values must lie between 0 and 1, got {outside}")

    tested = sorted(
        (name for name, p in p_values.items() if not isnan(p)), key=p_values.__getitem__
    )
    adjusted = dict.fromkeys(p_values, nan)
    largest = 0.0
    for place, name in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - place) * p_values[name]))
        adjusted[name] = largest
    return adjusted
