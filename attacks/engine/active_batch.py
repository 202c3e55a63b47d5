"""The active batch of one attack: places for units, which come and go while the attack runs.

A *unit* is the attempts at the images of one job, side by side: one image, or a group of images
that influence each other. A unit leaves when its attempt is over, and another one takes its place.
This file knows who is in which place; ``rounds`` knows what happens to the attempts there.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.attempts import Attempts, blank_attempts, joined, replaced, select
from ironmoe.attacks.engine.budget import Pace
from ironmoe.attacks.engine.counters import passes_of
from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.rounds import Rounds
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.random import example_keys


class Owner(NamedTuple):
    """The job that a unit belongs to, and the number of the attempt that is made there."""

    job: Job
    attempt: int


class UnderWay(NamedTuple):
    """A unit whose attempt has begun: how many queries were made for each of its images, and how
    many are left at most."""

    attack: Search
    owner: Owner
    made: list[int]
    left: list[int]


class ActiveBatch:
    """The active batch of one attack.

    Args:
        size: how many units it holds at most.
        unit_size: how many images a unit has.
        fixed: keep the number of attempts while units come and go (it only halves at the end), as a
            GPU wants it; else compute only attempts that have work to do.
        free_up_to: up to so many units cost hardly more than one.
        goes_on: attempts go on after a success, and keep their best point.

    Attributes:
        attempts: of all places, those of a unit side by side.
        owners: of each place; None: the place is free.
        ready: jobs whose next attempt may begin.
        returning: attempts whose success was not confirmed, which go on.
        played: how many rounds were played.
        pace: what they cost.
    """

    def __init__(
        self,
        attack: Search,
        size: int,
        unit_size: int,
        fixed: bool,
        free_up_to: int = 1,
        goes_on: bool = False,
    ) -> None:
        self.attack = attack
        self.size = size
        self.unit_size = unit_size
        self.fixed = fixed
        self.free_up_to = free_up_to
        self.rounds = Rounds(attack, unit_size, fixed, goes_on)
        self.attempts: Attempts = {}
        self.owners: list[Owner | None] = []
        self.ready: deque[Job] = deque()
        self.returning: deque[tuple[Owner, Attempts]] = deque()
        self.played = 0
        self.pace = Pace()

    @property
    def active(self) -> int:
        """Places that are taken."""
        return len(self._taken())

    @property
    def load(self) -> int:
        """Units that have or want a place."""
        return self.active + len(self.ready) + len(self.returning)

    @property
    def jobs(self) -> list[Job]:
        """The jobs that have or want a place."""
        at_work = [owner.job for owner in self.owners if owner is not None]
        interrupted = [owner.job for owner, _ in self.returning]
        return list(dict.fromkeys([*at_work, *interrupted, *self.ready]))

    @property
    def looks_at_clean_images(self) -> bool:
        """Whether an attempt begins with a pass of its clean images, as some routing modes want
        it."""
        return type(self.attack.attacked_model.routing).record is not RoutingMode.record

    @property
    def passes(self) -> int:
        """How many forward passes a round makes for each image, at most."""
        count = max(len(self.owners) * self.unit_size, 1)
        device = "cuda" if self.fixed else "cpu"
        return self.attack.passes_per_query(count, device) + self.rounds.confirms

    @property
    def has_queries(self) -> bool:
        """Whether attempts ask anything before their last point is predicted."""
        return self.attack.max_queries > 0 or self.rounds.keeps_best

    @property
    def under_way(self) -> list[UnderWay]:
        """The units whose attempts have begun and go on. The host waits for the device here."""
        there = [self.told_of([owner], attempts) for owner, attempts in self.returning]
        if self.owners:
            there.append(self.told_of(self.owners, self.attempts))
        return [unit for units in there for unit in units]

    def told_of(self, owners: Sequence[Owner | None], attempts: Attempts) -> list[UnderWay]:
        """How far these units are, without free places."""
        made = attempts["queries"].view(-1, self.unit_size).tolist()
        left = self.attack.queries_left(attempts).view(-1, self.unit_size).tolist()
        return [
            UnderWay(self.attack, owner, *numbers)
            for owner, *numbers in zip(owners, made, left, strict=True)
            if owner is not None
        ]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Inside the block are rounds, and what is around them; the cost goes to ``pace``."""
        model = self.attack.attacked_model
        played, forwards, began = self.played, model.forwards, self._now()
        yield
        if self.played > played:
            self.pace.add(self.played - played, model.forwards - forwards, self._now() - began)

    def _now(self) -> float:
        """The time at which the device has done all that it was told."""
        if self.attempts:
            bool(self.attempts["over"].any())
        return time.perf_counter()

    def fill(self, draining: bool = False, at_most: int | None = None) -> None:
        """Give free places to attempts: first those that go on, then the next attempts of waiting
        jobs.

        Args:
            draining: no other jobs will come, so jobs that are at work already begin later attempts
                in the places that are left.
            at_most: no more new attempts than this.
        """
        room = self.size - self.active
        returning = [self.returning.popleft() for _ in range(min(room, len(self.returning)))]
        owners = [owner for owner, _ in returning]
        parts = [attempts for _, attempts in returning]

        room -= len(owners)
        if at_most is not None:
            room = min(room, at_most)
        jobs = [self.ready.popleft() for _ in range(max(0, min(room, len(self.ready))))]
        new = [Owner(job, job.take_attempt()) for job in jobs]
        if draining:
            new += self._later_attempts(room - len(new), [*owners, *new])
        if new:
            owners += new
            parts.append(self._begin(new))

        if owners:
            self._place(owners, joined(parts))
        self._shrink()

    def round(self) -> None:
        """Ask the model once about every attempt, and let the attack go on. Nothing here waits for
        the device."""
        self.played += 1
        self.rounds.play(self.attempts)

    def take_finished(self) -> tuple[list[Owner], Attempts] | None:
        """Take out the units whose attempts are over; None if there are none. The host waits for
        the device here.

        ``candidate`` of an attempt that leaves is the point that is to be predicted again. A unit
        with ``bad`` attempts leaves, too.
        """
        bad = self.attempts["bad"].view(-1, self.unit_size).any(1)
        over = self.attempts["over"].view(-1, self.unit_size).all(1)
        gone = (over | bad).tolist()
        leaving = [place for place in self._taken() if gone[place]]
        if not leaving:
            return None

        attempts = self._in_places(leaving)
        attempts["candidate"] = self._candidates(attempts)
        owners = [owner for place in leaving if (owner := self.owners[place]) is not None]
        for place in leaving:
            self.owners[place] = None
        return owners, attempts

    def drop_cancelled(self, job: Job) -> None:
        """Take out the attempts of a job that another attempt made needless, and note what they
        cost."""
        for place in self._taken():
            owner = self.owners[place]
            if owner is not None and owner.job is job and job.is_cancelled(owner.attempt):
                job.note(passes_of(self._in_places([place])))
                self.owners[place] = None

        self.returning = deque(
            (owner, attempts)
            for owner, attempts in self.returning
            if owner.job is not job or not job.is_cancelled(owner.attempt)
        )

    def stop(self) -> list[Job]:
        """Take out everything, and note what the attempts at work cost."""
        jobs = self.jobs
        for place in self._taken():
            owner = self.owners[place]
            assert owner is not None
            owner.job.note(passes_of(self._in_places([place])))

        self.attempts = {}
        self.owners = []
        self.ready.clear()
        self.returning.clear()
        return jobs

    def _later_attempts(self, room: int, taken: list[Owner]) -> list[Owner]:
        """Attempts that run beside earlier ones of their job. An image that has withstood an
        attempt will likely need them all, so its attempts take all of the room. Attempts at other
        images are likely in vain, and take only places that cost next to nothing."""
        owners = [owner for owner in (*self.owners, *taken) if owner is not None]
        at_work = list(dict.fromkeys(owner.job for owner in owners))
        withstood = [job for job in at_work if any(end is not None for end in job.ends)]
        few = self.free_up_to - self.active - len(taken)

        new: list[Owner] = []
        for jobs, places in ((withstood, room), (at_work, min(room, few))):
            while len(new) < places and (left := [job for job in jobs if job.attempts_left]):
                new += [Owner(job, job.take_attempt()) for job in left[: places - len(new)]]
        return new

    def _begin(self, owners: list[Owner]) -> Attempts:
        """The first state of new attempts."""
        attack = self.attack
        jobs = [owner.job for owner in owners]
        examples = [example for job in jobs for example in job.examples]
        clean = torch.cat([job.images for job in jobs])

        def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=clean.device)

        def of_images(lists: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return column((value for values in lists for value in values), dtype)

        numbers = of_images(([owner.attempt] * self.unit_size for owner in owners), torch.int64)
        examples_numbers = column((example.number for example in examples), torch.int64)
        attempts = blank_attempts(
            clean,
            label=torch.cat([job.labels for job in jobs]),
            eps=of_images((job.eps for job in jobs), torch.float64),
            target=of_images((job.targets_of(number) for job, number in owners), torch.int64),
            clean_correct=of_images((job.wanted for job in jobs), torch.bool),
            key=example_keys(attack.seed, examples_numbers, numbers),
        )
        attempts["restart"] = numbers % attack.restarts

        for name in jobs[0].side:
            attempts[name] = torch.cat([job.side[name] for job in jobs])
        attempts |= attack.ball(attempts).edges()
        attempts |= attack.attacked_model.record(clean, attempts)
        attack.start(attempts)
        if not self.rounds.keeps_best:
            attempts["over"] = attempts["finished"]
        return attempts

    def _candidates(self, attempts: Attempts) -> Tensor:
        """(R, …) the points to be predicted again: the candidate of an attempt that succeeded, the
        last point of another."""
        if self.attack.keeps == "last":
            return attempts["point"]
        if self.rounds.keeps_best:
            return attempts["candidate"]
        found = attempts["found"].view(-1, *(1,) * (attempts["point"].ndim - 1))
        return torch.where(found, attempts["candidate"], attempts["point"])

    def _place(self, owners: list[Owner], new: Attempts) -> None:
        """Put new units into free places, or make room for them if there are too few."""
        free = [place for place, owner in enumerate(self.owners) if owner is None]
        if len(owners) <= len(free):
            places = free[: len(owners)]
            self.attempts = replaced(self.attempts, self._row_numbers(places), new)
            for place, owner in zip(places, owners, strict=True):
                self.owners[place] = owner
            return

        taken = self._taken()
        self.attempts = joined([self._in_places(taken), new]) if taken else new
        self.owners = [*(self.owners[place] for place in taken), *owners]
        if self.fixed:
            self._compact(min(self.size, _power_of_two(len(self.owners))))

    def _shrink(self) -> None:
        """Drop free places. After ``fill`` no attempt is waiting for one."""
        count = self.active
        target = _power_of_two(count) if self.fixed else count
        if target < len(self.owners):
            self._compact(target)

    def _compact(self, target: int) -> None:
        """Put the units at work first, and pad with free places up to ``target`` places. A free
        place holds a copy of some unit, since every place is computed."""
        taken = self._taken()
        filler = taken[0] if taken else 0
        places = taken + [filler] * (target - len(taken))
        self.attempts = self._in_places(places) if target else {}
        self.owners = [self.owners[place] for place in taken] + [None] * (target - len(taken))

    def _taken(self) -> list[int]:
        return [place for place, owner in enumerate(self.owners) if owner is not None]

    def _in_places(self, places: list[int]) -> Attempts:
        return select(self.attempts, self._row_numbers(places))

    def _row_numbers(self, places: list[int]) -> Tensor:
        device = self.attempts["key"].device
        first = torch.tensor(places, dtype=torch.int64, device=device) * self.unit_size
        return (first.unsqueeze(1) + torch.arange(self.unit_size, device=device)).flatten()


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0
