"""How far an evaluation is, and how long it will take."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ironmoe.attacks.engine.active_batch import Owner
from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.evaluation.costs import Ahead, Costs, Rest

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
    engine: Engine,
    jobs: Sequence[Job],
    not_begun: Sequence[int],
    unread: int,
    steady: bool,
    seconds: float,
) -> Left:
    """What the engine has still to do at least, and at most.

    At least each undecided image is predicted once more. At most every image holds under every
    attempt of every attack of its chain, and each attempt runs to its end.

    Args:
        jobs: those that have begun and are not decided.
        not_begun: for each chain, how many undecided images have no job yet.
        unread: how many images have not been predicted yet.
        steady: the model is known to give the same answer whenever it is asked.
        seconds: how long it has worked.
    """
    rest = Rest(engine, steady)
    passes = engine.admission.passes
    most = Ahead(Counter({None: min(sum(not_begun), unread) * passes}), Counter())
    for chain, count in enumerate(not_begun):
        if count:
            most.add(rest.after(chain, -1, None), count)

    fewest: dict[Job, int] = {}
    for attack, owner, made in _under_way(engine):
        most.add(Ahead(rest.attempt(attack), Counter()), len(made))
        most.queries[attack] -= sum(made)
        fewest[owner.job] = min(*made, fewest.get(owner.job, made[0]))
    for job in jobs:
        most.add(rest.of_job(job, fewest.get(job)), len(job.examples))

    least = min(max(not_begun, default=0), unread) * passes
    least += sum(len(job.examples) for job in _to_judge(engine)) * engine.judge.passes

    undecided = max(1, sum(not_begun) + sum(len(job.examples) for job in jobs))
    costs = Costs(engine, undecided, seconds)
    left, time_left = engine.budget.left(engine.spent), engine.budget.seconds_left
    needed = costs.forwards(most)

    # A query is a pass, so no more of them are made than the budget allows.
    for key, count in most.queries.items():
        most.queries[key] = int(min(count, left))
    longest = costs.seconds(most)
    if needed > left or longest > time_left:
        least = 0  # the budget may end it before
    shortest = min(costs.shortest(least), longest, time_left)
    return Left((least, int(min(needed, left))), (shortest, min(longest, time_left)))


def _under_way(engine: Engine) -> Iterator[tuple[Search, Owner, list[int]]]:
    """The units whose attempts have begun: (attack, owner, queries that were made for each image).
    The host waits for the device here."""
    for batch in engine.batches.values():
        for owner, made in batch.queries_made:
            yield batch.attack, owner, made
    for item in engine.leaving:
        size = item.batch.unit_size
        made = item.attempts["queries"].tolist()
        for place, owner in enumerate(item.owners):
            yield item.batch.attack, owner, made[place * size : (place + 1) * size]


def _to_judge(engine: Engine) -> set[Job]:
    """The jobs of which a prediction that counts is ahead: no attempt of theirs has been judged
    just now."""
    owners = [owner for batch in engine.batches.values() for owner in batch.owners if owner]
    owners += [owner for item in engine.leaving for owner in item.owners]
    owners += [owner for batch in engine.batches.values() for owner, _ in batch.returning]
    there = Counter(owner.job for owner in owners)
    waiting = {job for batch in engine.batches.values() for job in batch.ready}
    return waiting | {job for job, count in there.items() if count == len(job.running)}
