"""What the engine counts of each image: passes of the model, and signs that the search went wrong.

This file alone spells these facts. The active batch counts them in columns, one row an attempt;
jobs, records, results and reports carry ``Counters`` as a whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The loss was still rising if it gained much late in the attempt: after this share of the queries …
LATE = 0.9
# … more than this share of its whole gain.
STILL_RISING = 0.05


class Counters(NamedTuple):
    """What was counted for one image under one attack, or for a part of that work.

    found: the search counted some point as a success
    forwards, backwards: passes of the model that the image took part in
    zero_gradient: the first gradient of an attempt was 0 everywhere
    loss_rising: the loss was still rising at the end of an attempt that did not succeed
    """

    found: bool = False
    forwards: int = 0
    backwards: int = 0
    zero_gradient: bool = False
    loss_rising: bool = False

    def plus(self, other: "Counters") -> "Counters":
        """The sum: passes add up, and a sign is set if either has it."""
        return Counters(
            found=self.found or other.found,
            forwards=self.forwards + other.forwards,
            backwards=self.backwards + other.backwards,
            zero_gradient=self.zero_gradient or other.zero_gradient,
            loss_rising=self.loss_rising or other.loss_rising,
        )

    def with_verdict(self, fell: bool) -> "Counters":
        """The counters once the verdict is known. An image that fell counts as found, and whether
        its loss was still rising no longer matters."""
        return self._replace(found=self.found or fell, loss_rising=self.loss_rising and not fell)


SIGNS = Counters._fields[-2:]
"""The signs that a search went wrong; ``flags`` of results and reports have these names."""
ZERO_GRADIENT, LOSS_RISING = SIGNS


def blank_columns(key: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The columns (R,) of attempts that asked nothing yet; losses have the dtype of the images."""
    no = torch.zeros_like(key, dtype=torch.bool)
    zero = torch.zeros_like(key)
    lowest = torch.full_like(key, float("-inf"), dtype=dtype)
    return {
        "found": no,
        "forwards": zero,
        "backwards": zero,
        "zero_gradient": no,
        "loss_first": lowest,
        "loss_late": lowest,
        "loss_best": lowest,
    }


def count_answer(
    attempts: dict[str, Tensor],
    *,
    asked: Tensor | int,
    loss: Tensor,
    grad: Tensor | None,
    wanted_grad: Tensor,
    max_queries: int,
) -> None:
    """Note in the columns what one answer of the model cost and showed. Attempts that are over have
    no part in it.

    Args:
        asked: passes that the answer took for each attempt, a number or (R,).
        loss: (R,); grad: (R, …) or None; wanted_grad: (R,) bool, where there was a backward pass.
        max_queries: of an attempt that runs to its end.
    """
    at_work = ~attempts["over"]
    attempts["forwards"] = attempts["forwards"] + asked * at_work
    attempts["backwards"] = attempts["backwards"] + asked * (at_work & wanted_grad)

    queries = attempts["queries"]
    first = queries == 0
    if grad is not None:
        zero = (grad.flatten(1) == 0).all(1)
        attempts["zero_gradient"] = torch.where(
            first & wanted_grad, zero, attempts["zero_gradient"]
        )

    loss = loss.to(attempts["loss_best"].dtype)
    best = torch.where(at_work, attempts["loss_best"].maximum(loss), attempts["loss_best"])
    late = (queries + 1 > LATE * max_queries) & (queries > 0)
    attempts["loss_first"] = torch.where(first, loss, attempts["loss_first"])
    attempts["loss_best"] = best
    attempts["loss_late"] = torch.where(late, attempts["loss_late"], best)


def count_confirmation(attempts: dict[str, Tensor], asked: Tensor) -> None:
    """Note a pass of the judging model for the attempts that it was ``asked`` about, (R,) bool."""
    attempts["forwards"] = attempts["forwards"] + (asked & ~attempts["over"])


def forget_passes(attempts: dict[str, Tensor]) -> None:
    """Count passes from 0 again: the job has noted those so far, and the attempt goes on."""
    attempts["forwards"] = torch.zeros_like(attempts["forwards"])
    attempts["backwards"] = torch.zeros_like(attempts["backwards"])


def passes_of(attempts: Mapping[str, Tensor]) -> list[Counters]:
    """The passes of attempts that do not run to their end; nothing else is noted of them."""
    forwards = attempts["forwards"].tolist()
    backwards = attempts["backwards"].tolist()
    return [
        Counters(forwards=ahead, backwards=back)
        for ahead, back in zip(forwards, backwards, strict=True)
    ]


def final_columns(
    attempts: Mapping[str, Tensor], fell: Tensor, gradient: bool, passes: int
) -> dict[str, Tensor]:
    """The columns of ``Counters`` of attempts whose candidates were predicted again, in ``passes``
    that count as well.

    fell: (R,) bool, what that prediction said; gradient: whether the attack follows its loss.
    """
    gained = attempts["loss_best"] - attempts["loss_first"]
    gained_late = attempts["loss_best"] - attempts["loss_late"]
    rising = gradient & (gained_late > STILL_RISING * gained)
    return {
        "found": attempts["found"],
        "forwards": attempts["forwards"] + passes,
        "backwards": attempts["backwards"],
        "zero_gradient": attempts["zero_gradient"],
        "loss_rising": rising & ~fell,
    }


def counters_from(columns: Mapping[str, Any], place: int) -> Counters:
    """One image's counters, from columns under the names of the fields."""
    return Counters(
        found=bool(columns["found"][place]),
        forwards=columns["forwards"][place],
        backwards=columns["backwards"][place],
        zero_gradient=bool(columns["zero_gradient"][place]),
        loss_rising=bool(columns["loss_rising"][place]),
    )


def result_fields(columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that ``AttackResult`` and ``AttackSummary`` have of the counters of N images,
    which come as int64 (N,)."""
    return {
        "found": columns["found"].bool(),
        "forwards": columns["forwards"],
        "backwards": columns["backwards"],
        "flags": {name: columns[name].bool() for name in SIGNS},
    }
