"""How images fared so far under the attacks that they go through."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ironmoe.attacks.engine.job import Job, Stage

Place = tuple[int, int]
"""(chain, stage)"""


@dataclass
class Fared:
    """How images fared at one stage of a chain.

    fell, held: how many images left it so
    fell_passes, held_passes: of their searches there, added up
    """

    fell: int = 0
    held: int = 0
    fell_passes: int = 0
    held_passes: int = 0


class _Visit(NamedTuple):
    """When a job came to its stage: the stage, its attempts, and the passes made before."""

    stage: int
    attempts: int
    passes: int


class Falls:
    """What the jobs of a run tell when they begin, pass a stage, or are decided.

    Attributes:
        read: chain → images whose clean prediction is known.
        attacked: chain → those of them that are attacked.
    """

    def __init__(self, chains: Sequence[Sequence[Stage]]) -> None:
        self.read = Counter[int]()
        self.attacked = Counter[int]()
        self._fared = {
            (chain, stage): Fared()
            for chain, stages in enumerate(chains)
            for stage in range(len(stages))
        }
        self._visits: dict[Job, _Visit] = {}

    @property
    def under_way(self) -> Collection[Job]:
        """The jobs that have begun and are not decided."""
        return self._visits.keys()

    def at(self, place: Place) -> Fared:
        """How images fared there."""
        return self._fared[place]

    @property
    def ended(self) -> int:
        """How many images left a stage."""
        return sum(fared.fell + fared.held for fared in self._fared.values())

    def share_attacked(self, chain: int) -> float:
        """Of the images read; 1 before any was."""
        read = self.read[chain]
        return self.attacked[chain] / read if read else 1.0

    def note(self, job: Job, final: bool) -> None:
        """The job begins, has passed a stage, or is decided."""
        images = len(job.examples)
        passes = sum(counters.forwards for counters in job.counters)
        visit = self._visits.pop(job, None)
        if visit is None:
            self.read[job.chain] += images
            self.attacked[job.chain] += 0 if final else images
        elif final or job.stage != visit.stage:
            self._leave(job, visit, passes, held=not final or not job.all_wanted_fell)

        if not final:
            self._visits[job] = _Visit(job.stage, job.attempt_count, passes)

    def _leave(self, job: Job, visit: _Visit, passes: int, *, held: bool) -> None:
        fared = self._fared[job.chain, visit.stage]
        images = len(job.examples)
        verdicts = images * job.first.forwards * (visit.attempts if held else 1)
        searched = max(0, passes - visit.passes - verdicts)
        if held:
            fared.held += images
            fared.held_passes += searched
        else:
            fared.fell += images
            fared.fell_passes += searched
