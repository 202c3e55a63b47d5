"""How long it takes if images go on to fare as those before them did."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ironmoe.attacks.engine.active_batch import UnderWay
from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.evaluation.ahead.costs import MANY_ROWS, Costs
from ironmoe.attacks.evaluation.ahead.falls import Falls, Place

# Most images that fall do so early. One that holds for so large a share of its first attempt is
# expected to hold to the end.
ENOUGH = 0.1
# The first attempt at an image comes before the others, which run side by side.
IN_TURN = 2


class Stay(NamedTuple):
    """What an image that holds costs at one stage.

    passes: of its searches
    attempts: at it, each with its verdict
    stretch: passes as a share of those that the attack makes at most
    """

    passes: float
    attempts: int
    stretch: float


@dataclass
class Work:
    """What is likely left of one attack.

    passes: of its searches, single images
    images: how many images they are about
    rounds: how many follow one another for one image
    """

    passes: float = 0.0
    images: float = 0.0
    rounds: float = 0.0


class Likely:
    """What is likely left to do.

    An image that comes to a stage falls as often there as those before it, and at as many passes;
    where none came before, it holds.
    """

    def __init__(
        self, engine: Engine, falls: Falls, costs: Costs, under_way: Sequence[UnderWay]
    ) -> None:
        self.engine = engine
        self.costs = costs
        self.chains = engine.admission.chains
        self.falls = falls
        self.works: dict[Search, Work] = defaultdict(Work)
        self.verdicts = 0.0  # predictions that count, of single images
        self.knows_enough = falls.ended > 0

        self.under_way: dict[Job, list[UnderWay]] = defaultdict(list)
        self.made, self.over = Counter[Search](), Counter[Search]()
        for unit in under_way:
            most = unit.attack.max_queries
            self.under_way[unit.owner.job].append(unit)
            self.made[unit.attack] += sum(unit.made)
            self.over[unit.attack] += sum(most - left for left in unit.left)
            self.knows_enough |= min(unit.left) <= (1 - ENOUGH) * most
        self.holding: dict[Place, float] = defaultdict(float)  # images that hold so far
        for job in self.under_way:
            self.holding[job.chain, job.stage] += self._seen(job) * len(job.examples)

    def add_unread(self, chain: int, images: int) -> None:
        """Images that no job is about yet."""
        self.verdicts += images
        self._add_later(chain, 0, images * self.falls.share_attacked(chain))

    def add_job(self, job: Job) -> None:
        """A job that has begun and is not decided."""
        attack, images, to_begin = job.attack, len(job.examples), job.attempts_left
        units = self.under_way[job]
        if not job.next_attempt:
            self._add_later(job.chain, job.stage, images)
            return

        stay = self._stay(job.chain, job.stage, job.attempt_count)
        seen = self._seen(job)
        hold = seen + (1 - seen) * self._share_held((job.chain, job.stage))
        queries = to_begin * attack.max_queries * images
        queries += sum(left for unit in units for left in unit.left)
        rounds = max((max(unit.left) for unit in units), default=0)
        rounds += attack.max_queries * min(to_begin, IN_TURN - bool(units))

        work = self.works[attack]
        work.passes += hold * stay.stretch * queries * self.costs.passes(attack, MANY_ROWS)
        work.images += hold * images
        work.rounds = max(work.rounds, stay.stretch * rounds * min(1.0, hold * images))
        self.verdicts += images * (hold * to_begin + len(units))
        self._add_later(job.chain, job.stage + 1, hold * images)

    def seconds(self) -> float | None:
        """None: too little was seen to say so."""
        if not self.knows_enough or not self.costs.paces:
            return None
        total = sum(self._seconds(attack, work) for attack, work in self.works.items())
        return total + self.costs.of_verdicts(self.verdicts)

    @property
    def passes(self) -> float:
        """Forward passes of single images."""
        search = sum(work.passes for work in self.works.values())
        return search + self.verdicts * self.engine.judge.passes

    def _add_later(self, chain: int, stage: int, images: float) -> None:
        """Images that come to this stage, and to the ones after it if they hold."""
        for number, (attack, _) in enumerate(self.chains[chain]):
            if number < stage or not images:
                continue
            fared = self.falls.at((chain, number))
            stay = self._stay(chain, number, attack.restarts * max(1, attack.targets))
            hold = images * self._share_held((chain, number))
            fall = images - hold

            work = self.works[attack]
            work.passes += hold * stay.passes
            work.passes += fall * fared.fell_passes / max(1, fared.fell)
            work.images += images
            in_turn = min(stay.attempts, IN_TURN) * min(1.0, hold)
            work.rounds = max(work.rounds, stay.stretch * attack.max_queries * in_turn)
            self.verdicts += hold * stay.attempts + fall
            images = hold

    def _seen(self, job: Job) -> float:
        """How much of what it takes to show that the image of a job holds at its stage."""
        units = self.under_way[job]
        if job.attempt_count - job.attempts_left > len(units):
            return 1.0  # attempts of it have failed
        most = ENOUGH * job.attack.max_queries
        over = max(job.attack.max_queries - max(unit.left) for unit in units)
        return min(1.0, over / most) if most else 1.0

    def _share_held(self, place: Place) -> float:
        """Of the images that came there."""
        fared = self.falls.at(place)
        seen = fared.fell + fared.held + self.holding[place]
        return 1 - fared.fell / seen if seen else 1.0

    def _stay(self, chain: int, stage: int, attempts: int) -> Stay:
        """An image may have fewer classes that are targets than the attack asks for."""
        attack = self.chains[chain][stage].attack
        fared = self.falls.at((chain, stage))
        most = attempts * attack.max_queries * self.costs.passes(attack, MANY_ROWS)
        if fared.held:
            passes = fared.held_passes / fared.held
        else:  # some attacks pass over queries
            passes = most * self.made[attack] / self.over[attack] if self.over[attack] else most
        return Stay(passes, attempts, min(1.0, passes / most) if most else 0.0)

    def _seconds(self, attack: Search, work: Work) -> float:
        """As many rounds as one image needs; where more wait than there are places, full rounds,
        and half as many as one needs while the last ones leave."""
        attempts = attack.restarts * max(1, attack.targets)
        wanted = math.ceil(work.images) * attempts
        if not work.passes or not wanted:
            return 0.0

        places = min(self.engine.batch_size, wanted)
        each = self.costs.passes(attack, places)
        rounds = work.rounds * self.costs.passes(attack, MANY_ROWS) / each
        if wanted > places:
            rounds = max(rounds, work.passes / (places * each) + rounds / 2)
        return self.costs.likely(attack, min(rounds, work.passes), work.passes)
