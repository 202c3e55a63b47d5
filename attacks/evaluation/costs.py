"""What is ahead of images that hold, and how many passes and how long it takes at most."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ironmoe.attacks.engine.budget import Pace
from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.queue import FLAGS_READ_EVERY, Engine
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.engine.search import Search

# A query with a gradient takes about as long as so many forward passes: one, and two backwards.
WITH_GRADIENT = 3
# An attack that has asked nothing yet is guessed from the others: its cost may be off by this much.
GUESS = 2.0
# Candidates wait for their verdict until they are so large a share of the batch they came from.
SHARE_JUDGED = 1 / 5
# So many attempts of an image come one after another, even where all places are free: the first,
# one at another image that a verdict waits for, and the others side by side.
IN_TURN = 3

Amounts = Counter[Search | None]
"""A number for each attack; under None, for the predictions that count."""


class Ahead(NamedTuple):
    """What is to do for images that hold.

    queries: how many queries of each attack; under None, passes of predictions that count
    rounds: how many rounds of each attack follow one another for one image
    """

    queries: Amounts
    rounds: Amounts

    def add(self, other: "Ahead", images: int) -> None:
        """The same for more images, which run beside the others."""
        for attack, count in other.queries.items():
            self.queries[attack] += count * images
        for attack, count in other.rounds.items():
            self.rounds[attack] = max(count, self.rounds[attack])


class Rest:
    """What is ahead of one image that holds.

    Args:
        steady: the model is known to give the same answer whenever it is asked.
    """

    def __init__(self, engine: Engine, steady: bool) -> None:
        self.chains = engine.admission.chains
        self.judge = engine.judge
        self.steady = steady and not engine.saw_denial
        self.rounds_at_once = 1 if engine.kind == "cpu" else FLAGS_READ_EVERY
        self._known: dict[tuple[int, int, int | None], Ahead] = {}

    def of_job(self, job: Job, made: int | None) -> Ahead:
        """Without the attempts under way, except for the rounds that they need.

        made: the fewest queries that such an attempt has made; None: there is none.
        """
        attack, left = job.attack, job.attempts_left
        now = self._stage(attack, left, is_first=job.stage == 0)
        if made is not None:
            rounds = now.rounds[attack] + self._rounds(attack) - (0 if left else made)
            now.rounds[attack] = rounds
        classes = min(len(example.classes) for example in job.examples)
        later = self.after(job.chain, job.stage, classes)
        return Ahead(now.queries + later.queries, now.rounds + later.rounds)

    def after(self, chain: int, stage: int, classes: int | None) -> Ahead:
        """All later stages; classes: how many may be targets, None: as many as are asked for."""
        key = (chain, stage, classes)
        if key not in self._known:
            ahead = Ahead(Counter(), Counter())
            for number, (attack, _) in enumerate(self.chains[chain]):
                if number > stage:
                    targets = attack.targets if classes is None else min(attack.targets, classes)
                    attempts = attack.restarts * max(1, targets)
                    new = self._stage(attack, attempts, is_first=number == 0)
                    ahead = Ahead(ahead.queries + new.queries, ahead.rounds + new.rounds)
            self._known[key] = ahead
        return self._known[key]

    def attempt(self, attack: Search) -> Amounts:
        """A whole attempt."""
        looks = type(attack.attacked_model.routing).record is not RoutingMode.record
        passes = self._verdicts(attack) * self.judge.passes + looks
        return Counter({attack: self._lasts(attack), None: passes})

    def _stage(self, attack: Search, attempts: int, *, is_first: bool) -> Ahead:
        """So many attempts. After another stage, images come one by one, and each may wait for as
        long as the others' attempts last."""
        queries = {key: count * attempts for key, count in self.attempt(attack).items()}
        in_turn = min(attempts + (not is_first), IN_TURN) if attempts else 0
        return Ahead(Counter(queries), Counter({attack: in_turn * self._rounds(attack)}))

    def _rounds(self, attack: Search) -> int:
        """The rounds of an attempt. One whose success is denied waits while others go on."""
        may_wait = self._verdicts(attack) > 2 or (self._stops(attack) and self.judge.is_patient)
        return self._lasts(attack) * (2 if may_wait else 1)

    def _lasts(self, attack: Search) -> int:
        """How many queries are made for an attempt: also those after its end, until it is seen."""
        return attack.max_queries + (self.rounds_at_once - 1) * self._verdicts(attack)

    def _stops(self, attack: Search) -> bool:
        """Whether an attempt stops at a success, so that it goes on if the judge denies it."""
        return attack.keeps == "first" and not self.judge.is_another

    def _verdicts(self, attack: Search) -> int:
        """How often an attempt is judged at most. A steady model denies a success where rounding
        decides; a patient judge lets an attempt stop only once."""
        if not self._stops(attack):
            return 1
        denies = not self.steady or attack.attacked_model.searches_another_model
        if denies and not self.judge.is_patient:
            return 1 + attack.max_queries
        return 2


class Costs:
    """What that costs at most, from what was measured.

    Args:
        undecided: how many images there are to attack.
        seconds: how long the engine has worked.
    """

    def __init__(self, engine: Engine, undecided: int, seconds: float) -> None:
        self.engine = engine
        self.undecided = undecided
        self.rows = min(undecided, engine.batch_size)
        self.paces: dict[Search, list[Pace]] = {}
        for (attack, _), batch in engine.batches.items():
            if batch.pace.is_known:
                self.paces.setdefault(attack, []).append(batch.pace)

        # Reading images, the journal, and all else goes with the predictions that count.
        self.judging = engine.judge.pace
        around = seconds - sum(pace.seconds for each in self.paces.values() for pace in each)
        self.overhead = max(1.0, around / max(self.judging.seconds, 1e-9))

    def forwards(self, ahead: Ahead) -> int:
        """Forward passes of single images, at most."""
        counts = ahead.queries
        return counts[None] + sum(self._forwards(attack, ahead) for attack in _attacks(counts))

    def seconds(self, ahead: Ahead) -> float:
        """Seconds, at most."""
        attacks = _attacks(ahead.queries)
        total = sum(self._seconds(attack, ahead) for attack in attacks)
        passes = ahead.queries[None]
        if not self.judging.is_known or not passes:
            return total

        # Full batches of verdicts, and others after rounds of batches that were not full.
        verdicts = math.ceil(passes / self.engine.judge.passes)
        full = math.ceil(verdicts / self.engine.batch_size)
        few = math.ceil(full / SHARE_JUDGED) + ahead.rounds.total()
        rounds = full + sum(self._rounds(attack, ahead) for attack in attacks)
        calls = min(verdicts, min(few, rounds) + len(self.engine.batches))
        return total + self.overhead * self.judging.longest(calls, passes)

    def shortest(self, passes: int) -> float:
        """Seconds that so many passes of predictions that count take at least."""
        if not self.judging.is_known:
            return 0.0
        calls = passes / (self.engine.judge.passes * self.engine.batch_size)
        return self.overhead * self.judging.shortest(calls, passes)

    def _rounds(self, attack: Search, ahead: Ahead) -> int:
        """Rounds: those that one image needs, and while images wait for a place, full ones."""
        queries, rounds = ahead.queries[attack], ahead.rounds[attack]
        most_at_once = self.undecided * attack.restarts * max(1, attack.targets)
        if most_at_once > self.engine.batch_size:
            rounds += math.ceil(queries / self.engine.batch_size)
        return min(rounds, queries)

    def _forwards(self, attack: Search, ahead: Ahead) -> int:
        """Some attacks ask about more points at once where a batch has room for them."""
        queries = ahead.queries[attack]
        each, one = self._passes(attack, self.rows), self._passes(attack, 1)
        room = 0
        if one > each:
            counts = range(1, self.rows + 1)
            room = max(count * (self._passes(attack, count) - each) for count in counts)
        passes = min(one * queries, each * queries + room * self._rounds(attack, ahead))
        # A GPU computes a power of two of places, at most twice as many as are taken.
        return passes if self.engine.kind == "cpu" else 2 * passes

    def _passes(self, attack: Search, rows: int) -> int:
        """How many forward passes a query makes, in a batch of so many."""
        confirms = attack.attacked_model.searches_another_model
        return attack.passes_per_query(rows, self.engine.kind) + confirms

    def _seconds(self, attack: Search, ahead: Ahead) -> float:
        rounds, forwards = self._rounds(attack, ahead), self._forwards(attack, ahead)
        if attack in self.paces:
            return max(pace.longest(rounds, forwards) for pace in self.paces[attack])

        weight = WITH_GRADIENT if attack.gradient else 1
        calls = rounds * self._passes(attack, self.rows)
        guesses = [
            pace.longest(calls * weight / calls_of_round, forwards * weight / weight_of_known)
            for pace, calls_of_round, weight_of_known in self._known()
        ]
        return GUESS * max(guesses, default=0.0)

    def _known(self) -> Iterator[tuple[Pace, int, int]]:
        """(pace, forward passes that take as long as a round of one image, as one of its passes)"""
        if self.judging.is_known:
            yield self.judging, self.engine.judge.passes, 1
        for attack, paces in self.paces.items():
            weight = WITH_GRADIENT if attack.gradient else 1
            for pace in paces:
                yield pace, attack.eot * weight, weight


def _attacks(counts: Amounts) -> list[Search]:
    return [attack for attack, count in counts.items() if attack is not None and count > 0]
