"""Which blocks of a transformer have experts."""

import re
from collections.abc import Iterable


def placement(layers: str | Iterable[int], depth: int, name: str) -> list[int]:
    """Indices of the chosen blocks of ``depth``, ascending.

    Args:
        layers: "all"; "every n": blocks n − 1, 2n − 1, …; "last n": the last n of every second
            block 1, 3, 5, …; both as in V-MoE (arXiv 2106.05974). Or indices; negative ones count
            from the last.
        name: what the caller's argument is called, for the errors.
    """
    allowed = f'"all", "every n", "last n" or a list of indices from {-depth} to {depth - 1}'
    if isinstance(layers, str):
        rule = re.fullmatch(r"(every|last) ([1-9][0-9]*)", layers)
        if layers == "all":
            return list(range(depth))
        if rule is None:
            raise ValueError(f"{name} must be {allowed}, got {layers!r}")
        count, every_second = int(rule[2]), list(range(1, depth, 2))
        if rule[1] == "every":
            return list(range(count - 1, depth, count))
        if count > len(every_second):
            raise ValueError(
                f"{name} = {layers!r} asks for more than the {len(every_second)} odd blocks of "
                f"{depth}"
            )
        return every_second[-count:]
    if not isinstance(layers, Iterable):
        raise TypeError(f"{name} must be {allowed}, got {layers!r}")
    indices = list(layers)
    for index in indices:
        if not isinstance(index, int) or not -depth <= index < depth:
            raise ValueError(f"{name} must be {allowed}, got {index!r}")
    return sorted({index % depth for index in indices})
