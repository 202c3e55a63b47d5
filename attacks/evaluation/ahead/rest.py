"""What is ahead of images that hold, at most."""

from collections import Counter
from typing import NamedTuple

from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.queue import FLAGS_READ_EVERY, Engine
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.engine.search import Search

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
        undecided: how many images there are to attack.
        steady: the model is known to give the same answer whenever it is asked.
    """

    def __init__(self, engine: Engine, undecided: int, steady: bool) -> None:
        self.chains = engine.admission.chains
        self.at_work = {attack for (attack, _), batch in engine.batches.items() if batch.active}
        # Then a later stage begins when the last image has left the one before it.
        self.all_together = (
            undecided <= engine.batch_size
            and len(self.chains) == 1
            and set(engine.admission.unit_sizes) == {1}
        )
        self.judge = engine.judge
        self.steady = steady and not engine.saw_denial
        self.rounds_at_once = 1 if engine.kind == "cpu" else FLAGS_READ_EVERY
        self._known: dict[tuple[int, int, int | None], Ahead] = {}

    def of_job(self, job: Job, made: int | None) -> Ahead:
        """Without the attempts under way, except for the rounds that they need.

        made: the fewest queries that are over of such an attempt; None: there is none.
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
        """So many attempts. After another stage, images may come one by one, and each may wait for
        as long as the others' attempts last."""
        queries = {key: count * attempts for key, count in self.attempt(attack).items()}
        together = is_first or (self.all_together and attack not in self.at_work)
        in_turn = min(attempts + (not together), IN_TURN) if attempts else 0
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
