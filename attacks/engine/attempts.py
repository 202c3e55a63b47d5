"""Attempts in progress: many of one attack side by side, as a dict of tensors (R, …) with one row
an attempt.

An attempt is one run at one image from one start, at one target and one eps. Images that influence
each other are attempted together; then each image of the group has a row.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ironmoe.attacks.engine.counters import blank_columns

Attempts = dict[str, Tensor]
"""Every attempt has

clean:         (R, …) float32 or float64, the image, which is the centre of the ball
label:         (R, …) what the goal is about: (R,) int64 classes, or whatever it takes
eps:           (R,) float64, the radius
restart:       (R,) int64, 0 … restarts − 1, the same ones for every target
target:        (R,) int64, the class that a targeted loss makes for, where the attack has targets
key:           (R,) int64, on which its random numbers depend
clean_correct: (R,) bool, the image is to be fooled: it is right, and fell at no earlier stage
point:         (R, …) like clean, where the model is asked next
finished:      (R,) bool, ``point`` is the last one
stops:         (R,) bool, a success that the search sees ends the attempt, if its attack wants that
bad:           (R,) bool, an answer of the model was not finite

and what its attack and the active batch add. What else came with the images has columns, too
(``attacks.extra``). ``key`` is the template of columns (R,), since a label may have any shape.
"""


def select(attempts: Attempts, keep: Tensor) -> Attempts:
    """Some of the attempts, copied; ``keep`` is bool (R,) or the numbers of rows."""
    return {name: value[keep] for name, value in attempts.items()}


def replaced(attempts: Attempts, places: Tensor, new: Attempts) -> Attempts:
    """The attempts with ``new`` in these places. The tensors are copied, since an attack may keep
    one tensor under two names."""
    return {name: value.index_copy(0, places, new[name]) for name, value in attempts.items()}


def joined(parts: Sequence[Attempts]) -> Attempts:
    """All attempts of several dicts with the same names."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_columns(columns: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Columns (R,) of bool or int64 as lists. They are copied from the device together, so that the
    host waits once."""
    table = torch.stack(list(columns.values())).tolist()
    return dict(zip(columns, table, strict=True))


def where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """(R, …) the row of ``yes`` where the mask (R,) is set, else that of ``no``."""
    return torch.where(mask.view(-1, *(1,) * (yes.ndim - 1)), yes, no)


def blank_attempts(
    clean: Tensor, label: Tensor, eps: Tensor, target: Tensor, clean_correct: Tensor, key: Tensor
) -> Attempts:
    """Attempts as the active batch hands them to ``Attack.start``."""
    attempts: Attempts = {
        "clean": clean,
        "label": label,
        "eps": eps,
        "target": target,
        "clean_correct": clean_correct,
        "key": key,
        "candidate": clean,
    }
    attempts |= blank_columns(key, clean.dtype)

    no = torch.zeros_like(clean_correct)
    zero = torch.zeros_like(key)
    attempts |= dict.fromkeys(("finished", "over", "bad"), no)
    attempts["stops"] = ~no
    attempts |= dict.fromkeys(("queries", "best_count"), zero)
    attempts["found_at"] = zero - 1
    attempts["best_score"] = torch.full_like(key, float("-inf"), dtype=clean.dtype)
    return attempts
