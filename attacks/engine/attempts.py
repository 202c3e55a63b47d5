"""Rows: attempts in progress, many of one attack side by side, as a dict of tensors that all have
the rows first.

An attempt is one run at one image (in a model that couples images: at one group of them) from one
start, at one target and one eps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Attempts = dict[str, Tensor]
"""Every attempt has

clean:         (R, …) float32 or float64, the image; the centre of the ball
label:         (R,) int64
eps:           (R,) float64
restart:       (R,) int64, 0 … restarts − 1, the same ones for every target
target:        (R,) int64, the class a targeted loss drives to; the label where the attack has no
    targets
key:           (R,) int64, what its random numbers depend on
clean_correct: (R,) bool: to be fooled; right, and not fallen at an earlier stage
point:         (R, …) like clean: where the model is asked next
finished:      (R,) bool: ``point`` is the last one

and what its attack and its lane add.
"""


def select(attempts: Attempts, keep: Tensor) -> Attempts:
    """These rows, copied; ``keep`` is bool (R,) or int64."""
    return {name: value[keep] for name, value in attempts.items()}


def replaced(attempts: Attempts, places: Tensor, new: Attempts) -> Attempts:
    """``rows`` with ``new`` in these places. A copy: an attack may keep one tensor under two
    names."""
    return {name: value.index_copy(0, places, new[name]) for name, value in attempts.items()}


def joined(parts: Sequence[Attempts]) -> Attempts:
    """All rows of several dicts with the same names."""
    return (
        parts[0]
        if len(parts) == 1
        else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    )


def where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` where the mask (R,) is set, else of ``no``."""
    return torch.where(mask.view(-1, *(1,) * (yes.ndim - 1)), yes, no)


def blank_attempts(
    clean: Tensor, label: Tensor, eps: Tensor, target: Tensor, clean_correct: Tensor, key: Tensor
) -> Attempts:
    """Rows as a lane hands them to ``Attack.start``."""
    attempts: Attempts = {
        "clean": clean, "label": label, "eps": eps, "target": target,
        "clean_correct": clean_correct, "key": key, "candidate": clean
    }  # fmt: skip
    no, zero = torch.zeros_like(clean_correct), torch.zeros_like(label)
    attempts |= dict.fromkeys(("finished", "over", "found", "zero_gradient"), no)
    attempts |= dict.fromkeys(("queries", "forwards", "backwards", "best_count"), zero)
    attempts["found_at"] = zero - 1
    lowest = torch.full_like(label, float("-inf"), dtype=clean.dtype)
    attempts |= dict.fromkeys(("loss_first", "loss_late", "loss_best", "best_score"), lowest)
    return attempts
