"""What a claim of the paper is to a study: a sentence, a direction, and where it looks."""

from collections.abc import Callable
from typing import NamedTuple

from ironmoe.bench.study.claims.parts.contrast import Contrast
from ironmoe.bench.study.claims.parts.evidence import Evidence
from ironmoe.bench.study.claims.parts.verdict import Effect


class Findings(NamedTuple):
    """What a claim found.

    primary: what decides, each with at least one seed; of several all have to agree. None: it was
    not measured. others: what stands beside; sentences: the numbers of both in words; missing: what
    was not measured; confounded: why even clear effects would not support the claim, "" if nothing
    stands against it; blind: why nothing could be told, whatever the truth, else "".
    """

    primary: list[Contrast]
    others: list[Effect]
    sentences: list[str]
    missing: list[str]
    confounded: str = ""
    blind: str = ""


class Claim(NamedTuple):
    """key: its name; sentence: what is claimed; direction: 1 if it says that the primary contrasts
    are above 0, −1 below, 0 that nothing changes; look: how it is asked."""

    key: str
    sentence: str
    direction: int
    look: Callable[[Evidence], Findings]
