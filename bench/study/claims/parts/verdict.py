"""What a study says of one claim."""

from math import isfinite, nan
from typing import Any, Literal, NamedTuple

Answer = Literal["supported", "against", "undecided", "not measured"]
Role = Literal["primary", "control", "secondary", "exploratory"]


class Effect(NamedTuple):
    """One contrast over the seeds.

    label: what is compared; role: "primary" decides, "control" qualifies, "secondary" stands beside
    and "exploratory" has no part in the claim.

    mean, low, high: in ``unit``, with the 95 % t interval over seeds, NaN where there is none;
    by_seed: the same for each seed; runs: how many seeds, or models where no seed has a number.

    p: two-sided, by ``test``; p_flips, least_p_flips: by flipping signs, and how small it can be
    with so many seeds; p_equivalent: of TOST at ``smallest_text``; p_holm: of a primary contrast,
    the claim's p-value over all claims of this training. NaN where there is none.
    """

    label: str
    role: Role
    unit: str
    smallest_text: str
    mean: float
    low: float
    high: float
    runs: int
    by_seed: dict[int, float]
    p: float
    test: str
    p_flips: float = nan
    least_p_flips: float = nan
    p_equivalent: float = nan
    p_holm: float = nan


class Verdict(NamedTuple):
    """The answer to one claim for one training.

    claim: its key; sentence: what is claimed; training: how the models were trained

    verdict: "supported": the whole interval lies beyond the smallest effect of interest, on the
        side of the claim, and Holm's p-value is at most 5 %. "against": it lies on the other side
        of 0, or no effect of that size is left. "undecided": neither. "not measured": there is
        nothing to judge by, and ``missing`` says what.
    because: which rule gave the verdict, a key of ``BECAUSE``
    words: the numbers in sentences
    effects: all contrasts, the primary ones first
    runs: how many seeds the primary contrasts have
    runs_needed: of an undecided one, how many would decide; None if nobody can tell or none would
    missing: measurements that were not there
    """

    claim: str
    sentence: str
    training: str
    verdict: Answer
    because: str
    words: str
    effects: tuple[Effect, ...]
    runs: int
    runs_needed: int | None
    missing: tuple[str, ...]


BECAUSE: dict[str, Answer] = {
    "effect": "supported",
    "equivalence": "supported",
    "opposite": "against",
    "no difference": "against",
    "change": "against",
    "few runs": "undecided",
    "contains 0": "undecided",
    "Holm": "undecided",
    "may be small": "undecided",
    "confounded": "undecided",
    "blind": "undecided",
    "neither": "undecided",
    "not measured": "not measured",
}


def as_entry(verdict: Verdict) -> dict[str, Any]:
    """The verdict ready for JSON, with None for NaN."""
    effects = [
        {name: _finite(value) for name, value in effect._asdict().items()}
        | {"by_seed": {str(seed): value for seed, value in effect.by_seed.items()}}
        for effect in verdict.effects
    ]
    return verdict._asdict() | {"effects": effects, "missing": list(verdict.missing)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
