"""How far an evaluation is, and how long it will take."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ironmoe.attacks.engine.active_batch import UnderWay
from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.evaluation.ahead.costs import Costs
from ironmoe.attacks.evaluation.ahead.falls import Falls
from ironmoe.attacks.evaluation.ahead.likely import Likely
from ironmoe.attacks.evaluation.ahead.rest import Ahead, Rest

Ends = tuple[float, float]


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
        attack and each pass counts for as few queries as can be); None without a total
    seconds_left: the same, as time at the pace so far, and no longer than a budget allows
    seconds_expected: the time left if images go on to fare as those before them did, between these
        two; None while too little was seen to say so
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
    seconds_expected: float | None = None

    @property
    def images_per_second(self) -> float:
        """How many images went through all attacks in a second of this run."""
        return self.fresh / self.attacks / max(self.seconds, 1e-9)


class Left(NamedTuple):
    """What is left to do, in the words of ``Progress``."""

    forwards_left: tuple[int, int]
    seconds_left: Ends
    seconds_expected: float | None


def work_left(
    engine: Engine,
    not_begun: Sequence[int],
    unread: int,
    steady: bool,
    seconds: float,
    falls: Falls,
) -> Left:
    """What the engine has still to do at least, at most, and likely.

    At least each undecided image is predicted once more. At most every image holds under every
    attempt of every attack of its chain, and each attempt runs to its end.

    Args:
        not_begun: for each chain, how many undecided images have no job yet.
        unread: how many images have not been predicted yet.
        steady: the model is known to give the same answer whenever it is asked.
        seconds: how long it has worked.
        falls: how images fared so far, and which jobs are under way.
    """
    jobs = falls.under_way
    undecided = max(1, sum(not_begun) + sum(len(job.examples) for job in jobs))
    under_way = _under_way(engine)
    rest = Rest(engine, undecided, steady)
    passes = engine.admission.passes
    most = Ahead(Counter({None: min(sum(not_begun), unread) * passes}), Counter())
    for chain, count in enumerate(not_begun):
        if count:
            most.add(rest.after(chain, -1, None), count)

    fewest: dict[Job, int] = {}
    for attack, owner, _, queries_left in under_way:
        over = [attack.max_queries - one for one in queries_left]
        most.add(Ahead(rest.attempt(attack), Counter()), len(over))
        most.queries[attack] -= sum(over)
        fewest[owner.job] = min(*over, fewest.get(owner.job, over[0]))
    for job in jobs:
        most.add(rest.of_job(job, fewest.get(job)), len(job.examples))

    least = min(max(not_begun, default=0), unread) * passes
    least += sum(len(job.examples) for job in _to_judge(engine)) * engine.judge.passes

    costs = Costs(engine, undecided, seconds)
    left, time_left = engine.budget.left(engine.spent), engine.budget.seconds_left
    needed = costs.forwards(most)

    # A query is a pass, so no more of them are made than the budget allows.
    for key, count in most.queries.items():
        most.queries[key] = int(min(count, left))
    longest = costs.seconds(most)
    if needed > left or longest > time_left:
        least = 0  # the budget may end it before
    longest = min(longest, time_left)
    shortest = min(costs.shortest(least), longest)

    likely = Likely(engine, falls, costs, under_way)
    for chain, count in enumerate(not_begun):
        likely.add_unread(chain, count)
    for job in jobs:
        likely.add_job(job)
    expected = likely.seconds()
    if expected is not None:
        expected *= min(1.0, left / max(1.0, likely.passes))
        expected = min(max(expected, shortest), longest)
    return Left((least, int(min(needed, left))), (shortest, longest), expected)


def _under_way(engine: Engine) -> list[UnderWay]:
    """The units whose attempts have begun, also those that wait for their verdict. The host waits
    for the device here."""
    there = [batch.under_way for batch in engine.batches.values()]
    there += [item.batch.told_of(item.owners, item.attempts) for item in engine.leaving]
    return [unit for units in there for unit in units]


def _to_judge(engine: Engine) -> set[Job]:
    """The jobs of which a prediction that counts is ahead: no attempt of theirs has been judged
    just now."""
    owners = [owner for batch in engine.batches.values() for owner in batch.owners if owner]
    owners += [owner for item in engine.leaving for owner in item.owners]
    owners += [owner for batch in engine.batches.values() for owner, _ in batch.returning]
    there = Counter(owner.job for owner in owners)
    waiting = {job for batch in engine.batches.values() for job in batch.ready}
    return waiting | {job for job, count in there.items() if count == len(job.running)}
