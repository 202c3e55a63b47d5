"""How far an evaluation is, and how long it will take."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ironmoe.attacks.engine.budget import Pace
from ironmoe.attacks.engine.job import Job, Stage
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.engine.search import Search

# A query with a gradient takes about as long as so many forward passes: one, and two backwards.
WITH_GRADIENT = 3
# An attack that has asked nothing yet is guessed from the others: its cost may be off by this much.
GUESS = 2.0

Ends = tuple[float, float]
Ahead = Counter[Search | None]
"""How many queries of each attack are ahead; under None, passes of predictions that count."""


class Progress(NamedTuple):
    """How far this process is.

    decided: how many (image, attack) pairs are settled
    total: about how many such pairs there are; None while the data has no known length
    attacks: how many attacks an image goes through
    fresh: how many pairs were settled in this run, without those that a journal knew
    seconds: how long this run has attacked
    forwards: how many forward passes of single images this run made
    broken: in how many of the fresh pairs the image fell, or was wrong without any attack
    at_work: the attack that runs now, of an ensemble its part; empty before the first
    forwards_left: (if all undecided images fall at once, if all hold to the end of the last
        attack); None without a total
    seconds_left: the same, as time at the pace so far, and no longer than a budget allows
    """

    decided: int
    total: int | None
    attacks: int
    fresh: int
    seconds: float
    forwards: int
    broken: int = 0
    at_work: str = ""
    forwards_left: tuple[int, int] | None = None
    seconds_left: Ends | None = None

    @property
    def images_per_second(self) -> float:
        """How many images went through all attacks in a second of this run."""
        return self.fresh / self.attacks / max(self.seconds, 1e-9)


class Left(NamedTuple):
    """What is left to do: (least, most) forward passes of single images, and seconds."""

    forwards: tuple[int, int]
    seconds: Ends


def work_left(
    engine: Engine, jobs: Sequence[Job], not_begun: Sequence[int], seconds: float
) -> Left:
    """What the engine has still to do at least, and at most.

    At least each undecided image is predicted once more. At most every image holds under every
    attempt of every attack of its chain, and each attempt runs to its end.

    Args:
        jobs: those that have begun and are not decided.
        not_begun: for each chain, how many undecided images have no job yet.
        seconds: how long it has worked.
    """
    passes = engine.judge.passes
    clean = max(not_begun, default=0) * engine.admission.passes
    least: Ahead = Counter({None: clean})
    most: Ahead = Counter({None: clean})

    rest = _Rest(engine.admission.chains, passes)
    for chain, count in enumerate(not_begun):
        _add(most, rest.after(chain, -1, None), count)

    for job in jobs:
        images = len(job.examples)
        _add(most, rest.after(job.chain, job.stage, _classes(job)), images)
        _add(most, rest.attempts(job.attack, job.attempts_left), images)
    for batch in engine.batches.values():
        _add(most, rest.attempts(batch.attack, batch.running), batch.unit_size)
        most[batch.attack] -= batch.queries_made
    most[None] += sum(item.images for item in engine.leaving) * passes
    least[None] += sum(len(job.examples) for job in _to_judge(engine)) * passes

    undecided = max(1, sum(not_begun) + sum(len(job.examples) for job in jobs))
    costs = _Costs(engine, undecided, seconds)
    forwards = (costs.forwards(least), costs.forwards(most))
    return _within_budget(engine, Left(forwards, (costs.seconds(least, 0), costs.seconds(most, 1))))


class _Rest:
    """What is ahead of one image that holds, after a stage of its chain."""

    def __init__(self, chains: Sequence[Sequence[Stage]], passes: int) -> None:
        self.chains = chains
        self.passes = passes
        self._known: dict[tuple[int, int, int | None], Ahead] = {}

    def after(self, chain: int, stage: int, classes: int | None) -> Ahead:
        """All later stages; classes: how many may be targets, None: as many as are asked for."""
        key = (chain, stage, classes)
        if key not in self._known:
            ahead: Ahead = Counter()
            for attack, _ in self.chains[chain][stage + 1 :]:
                targets = attack.targets if classes is None else min(attack.targets, classes)
                _add(ahead, self.attempts(attack, attack.restarts * max(1, targets)), 1)
            self._known[key] = ahead
        return self._known[key]

    def attempts(self, attack: Search, count: int) -> Ahead:
        """So many whole attempts."""
        looks = type(attack.attacked_model.routing).record is not RoutingMode.record
        return Counter({attack: count * attack.max_queries, None: count * (self.passes + looks)})


class _Costs:
    """What a query of each attack costs, in passes and in seconds, from what was measured.

    Args:
        undecided: how many images there are to attack.
        seconds: how long the engine has worked.
    """

    def __init__(self, engine: Engine, undecided: int, seconds: float) -> None:
        self.paces: dict[Search, list[Pace]] = {}
        for (attack, _), batch in engine.batches.items():
            if batch.pace.is_known:
                self.paces.setdefault(attack, []).append(batch.pace)
        self.count = min(undecided, engine.batch_size)
        self.kind = engine.kind

        paces = [batch.pace for batch in engine.batches.values()]
        counting = max(1, engine.spent - sum(pace.forwards for pace in paces))
        # Reading images, clean predictions, verdicts and the journal.
        around = max(0.0, seconds - sum(pace.seconds for pace in paces))
        self.verdict = around / counting

        units = [
            [end / self._units(attack) for end in self._seconds_per_query(attack)]
            for attack in self.paces
        ]
        self.guess = (
            min((low for low, _ in units), default=self.verdict) / GUESS,
            max((high for _, high in units), default=self.verdict) * GUESS,
        )

    def forwards(self, ahead: Ahead) -> int:
        return round(
            sum(
                count * (1 if attack is None else self._forwards_per_query(attack))
                for attack, count in ahead.items()
            )
        )

    def seconds(self, ahead: Ahead, end: int) -> float:
        """end: 0 for the least, 1 for the most that was measured."""
        return sum(
            count * (self.verdict if attack is None else self._seconds_per_query(attack)[end])
            for attack, count in ahead.items()
        )

    def _forwards_per_query(self, attack: Search) -> float:
        known = self.paces.get(attack)
        if known is None:
            return attack.passes_per_query(self.count, self.kind)
        return max(attack.eot, *(pace.forwards_per_query for pace in known))

    def _seconds_per_query(self, attack: Search) -> Ends:
        known = self.paces.get(attack)
        if known is None:
            return self.guess[0] * self._units(attack), self.guess[1] * self._units(attack)
        ends = [pace.seconds_per_query for pace in known]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def _units(self, attack: Search) -> float:
        """Forward passes that take as long as a query."""
        return self._forwards_per_query(attack) * (WITH_GRADIENT if attack.gradient else 1)


def _within_budget(engine: Engine, left: Left) -> Left:
    """No more than the budget allows."""
    forwards, seconds = engine.budget.left(engine.spent), engine.budget.seconds_left
    share = min(1.0, forwards / max(left.forwards[1], 1))
    least, most = left.forwards
    shortest, longest = left.seconds
    return Left(
        (int(min(least, forwards)), int(min(most, forwards))),
        (min(shortest, seconds), min(max(longest * share, shortest), seconds)),
    )


def _to_judge(engine: Engine) -> set[Job]:
    """The jobs of which a prediction that counts is ahead: no attempt of theirs has been judged
    just now."""
    owners = [owner for batch in engine.batches.values() for owner in batch.owners if owner]
    owners += [owner for item in engine.leaving for owner in item.owners]
    owners += [owner for batch in engine.batches.values() for owner, _ in batch.returning]
    there = Counter(owner.job for owner in owners)
    waiting = {job for batch in engine.batches.values() for job in batch.ready}
    return waiting | {job for job, count in there.items() if count == len(job.running)}


def _classes(job: Job) -> int:
    return min(len(example.classes) for example in job.examples)


def _add(to: Ahead, ahead: Ahead, times: int) -> None:
    for attack, count in ahead.items():
        to[attack] += count * times
