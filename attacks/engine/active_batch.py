"""A lane: the active batch of one attack, in which rows come and go while it runs.

The rows of a *unit* stay side by side: one image, or a group of images that influence each other. A
unit leaves when its attempt is over and another takes its place; every row is at a step of its own.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.attacked_model import Answer
from ironmoe.attacks.engine.attempts import (
    Attempts,
    blank_attempts,
    joined,
    replaced,
    select,
    where,
)
from ironmoe.attacks.engine.job import Job
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.random import example_keys

# rows with and rows without a gradient: fewer are cheaper asked together, all with one
SPLIT_FROM = 8
# what the judging model's answer to a row depends on
JUDGED = ("point", "clean", "label", "eps", "low", "high")
LATE = 0.9  # of an attempt: what the loss gains after that tells whether it was still rising


class Owner(NamedTuple):
    """Whose attempt a unit's rows are."""

    job: Job
    attempt: int


class ActiveBatch:
    """The active batch of one attack.

    Args:
        size: units it holds at most.
        unit: rows of a unit.
        fixed: keep the number of rows while units come and go (it only halves at the end), as a GPU
            wants it; else only rows that have work to do are computed.
        free_up_to: units that cost hardly more than one.
    """

    def __init__(
        self, attack: Search, size: int, unit: int, fixed: bool, free_up_to: int = 1
    ) -> None:
        self.attack, self.size, self.unit, self.fixed, self.free_up_to = (
            attack,
            size,
            unit,
            fixed,
            free_up_to,
        )
        self.coupled_by_model = attack.coupled_by_model and unit > 1
        self.attempts: Attempts = {}
        self.owners: list[Owner | None] = []  # of each unit of rows
        self.ready: deque[Job] = deque()  # cases whose next attempt may begin
        # attempts whose success was not confirmed, to go on
        self.returning: deque[tuple[Owner, Attempts]] = deque()

    @property
    def active(self) -> int:
        return sum(owner is not None for owner in self.owners)

    @property
    def load(self) -> int:
        """Units that have or want a place."""
        return self.active + len(self.ready) + len(self.returning)

    def fill(self, draining: bool = False, at_most: int | None = None) -> None:
        """Give free places to attempts: interrupted ones, then next ones of waiting cases, then, if
        nothing else will come, later attempts of cases that are at work already. Of new ones no
        more than ``at_most``."""
        room = self.size - self.active
        owners: list[Owner] = []
        parts: list[Attempts] = []
        while self.returning and len(owners) < room:
            owner, attempts = self.returning.popleft()
            owners.append(owner)
            parts.append(attempts)
        new: list[Owner] = []
        room -= len(owners)
        room = room if at_most is None else min(room, at_most)
        while self.ready and len(new) < room:
            job = self.ready.popleft()
            new.append(Owner(job, job.take_attempt()))
        if draining:
            new += self._siblings(room - len(new), [*owners, *new])
        if new:
            owners += new
            parts.append(self._begin(new))
        self._place(owners, parts)
        self._shrink()

    def round(self) -> None:
        """Ask the model once about every row and let the attack go on. Nothing here waits for the
        device."""
        attempts, attack, before = self.attempts, self.attack, dict(self.attempts)
        over, last_call = attempts["over"], attempts["finished"]
        answer, wanted_grad = self._ask()
        fooled = attack.fooled(answer.logits, attempts)
        if not attack.inside:
            fooled = fooled & (attack.ball(attempts).distance(attempts["point"]) <= attempts["eps"])
        self._count(attempts, answer, wanted_grad)
        complete = self._judge(attempts, answer, fooled & attempts["clean_correct"])
        attempts["queries"] = attempts["queries"] + answer.used
        attack.advance(attempts, answer.logits, answer.loss, answer.grad)
        # rows that are over wait as they are: if their success is not confirmed, they go on
        if self.fixed or self.unit > 1:
            for name, old in before.items():
                if attempts[name] is not old:
                    attempts[name] = where(over, old, attempts[name])
        # An attack that keeps the best asks about its last point, too; another leaves that to the
        # prediction that counts.
        attempts["over"] = (
            over | complete | (last_call if self.keeps_best else attempts["finished"])
        )

    def harvest(self) -> tuple[list[Owner], Attempts] | None:
        """Take out the units that are over; the host waits for the device here. None: nobody left.

        ``point`` of a row that leaves is the candidate: where it succeeded, or the best or last
            one.
        """
        self.attack.attacked_model.check()
        over = self.attempts["over"].view(-1, self.unit).all(1).tolist()
        leaving = [
            place for place, owner in enumerate(self.owners) if owner is not None and over[place]
        ]
        if not leaving:
            return None
        attempts = select(self.attempts, self._row_numbers(leaving))
        owners = [self.owners[place] for place in leaving]
        for place in leaving:
            self.owners[place] = None
        return [owner for owner in owners if owner is not None], attempts

    def drop_cancelled(self, job: Job) -> None:
        """Take out the attempts at a case that another made needless; what they cost is noted."""
        for place, owner in enumerate(self.owners):
            if owner is not None and owner.job is job and job.is_cancelled(owner.attempt):
                job.note_cost(select(self.attempts, self._row_numbers([place])))
                self.owners[place] = None
        self.returning = deque(
            item
            for item in self.returning
            if item[0].job is not job or not job.is_cancelled(item[0].attempt)
        )

    def _shrink(self) -> None:
        """Give up places that nobody will take."""
        count = self.active
        target = _power_of_two(count) if self.fixed else count
        if target < len(self.owners):
            self._compact(target)

    @property
    def jobs(self) -> list[Job]:
        """That have or want a place."""
        owners = [owner for owner in self.owners if owner is not None] + [
            owner for owner, _ in self.returning
        ]
        return list(dict.fromkeys([*(owner.job for owner in owners), *self.ready]))

    def stop(self) -> list[Job]:
        """Take out everything; what attempts at work cost is noted."""
        jobs = self.jobs
        for place, owner in enumerate(self.owners):
            if owner is not None:
                owner.job.note_cost(select(self.attempts, self._row_numbers([place])))
        self.attempts, self.owners = {}, []
        self.ready.clear()
        self.returning.clear()
        return jobs

    @property
    def records(self) -> bool:
        """Whether an attempt begins with a look at its clean images, as some routing modes want
        it."""
        return type(self.attack.attacked_model.routing).record is not RoutingMode.record

    @property
    def passes(self) -> int:
        """Of each row in a round, at most."""
        count = max(len(self.owners) * self.unit, 1)
        return self.attack.passes_per_query(count, "cuda" if self.fixed else "cpu") + self._confirms

    @property
    def has_queries(self) -> bool:
        """Whether attempts ask anything before their last point is predicted."""
        return self.attack.max_queries > 0 or self.keeps_best

    @property
    def keeps_best(self) -> bool:
        return self.attack.keeps == "best" or (
            self.coupled_by_model and self.attack.keeps == "first"
        )

    @property
    def _confirms(self) -> bool:
        """Whether the best of an attempt is chosen among points that the judging model is fooled
        by, too, not the search's alone."""
        return self.keeps_best and self.attack.attacked_model.searches_another_model

    def _siblings(self, room: int, taken: list[Owner]) -> list[Owner]:
        """Attempts side by side with earlier ones of their case. An image that has withstood an
        attempt will likely need them all; of others only so many as cost next to nothing."""
        new: list[Owner] = []
        at_work = list(
            dict.fromkeys(owner.job for owner in (*self.owners, *taken) if owner is not None)
        )
        withstood = [job for job in at_work if any(outcome is not None for outcome in job.outcomes)]
        few = self.free_up_to - self.active - len(taken)
        for jobs, places in ((withstood, room), (at_work, min(room, few))):
            while len(new) < places and (left := [job for job in jobs if job.attempts_left]):
                new += [Owner(job, job.take_attempt()) for job in left[: places - len(new)]]
        return new

    def _begin(self, owners: list[Owner]) -> Attempts:
        attack, jobs = self.attack, [owner.job for owner in owners]
        clean = torch.cat([job.images for job in jobs])

        def column(lists: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return torch.tensor(
                [value for values in lists for value in values], dtype=dtype, device=clean.device
            )

        numbers = column(([owner.attempt] * self.unit for owner in owners), torch.int64)
        attempts = blank_attempts(
            clean,
            column((job.labels for job in jobs), torch.int64),
            column((job.eps for job in jobs), torch.float64),
            column((owner.job.targets_of(owner.attempt) for owner in owners), torch.int64),
            column((job.wanted for job in jobs), torch.bool),
            example_keys(attack.seed, column((job.numbers for job in jobs), torch.int64), numbers),
        )
        attempts["restart"] = numbers % attack.restarts
        attempts |= attack.ball(attempts).edges()
        attempts |= attack.attacked_model.record(clean)
        attack.start(attempts)
        if not self.keeps_best:
            attempts["over"] = attempts["finished"]
        return attempts

    def _ask(self) -> tuple[Answer, Tensor]:
        """(answers to all rows, which rows had a gradient taken)."""
        attempts, attack = self.attempts, self.attack
        want = None if self.fixed else attack.wants_gradient(attempts)
        if want is None or bool(want.all()):
            answer = attack.ask(attempts, attack.gradient)
            return answer, torch.full_like(attempts["found"], attack.gradient)
        if not bool(want.any()):
            answer = attack.ask(attempts, False)
            return answer._replace(grad=torch.zeros_like(attempts["point"])), want
        if int(want.sum()) < SPLIT_FROM or int((~want).sum()) < SPLIT_FROM:
            return attack.ask(attempts, attack.gradient), torch.full_like(
                attempts["found"], attack.gradient
            )
        parts = {
            flag: want.nonzero().squeeze(1) if flag else (~want).nonzero().squeeze(1)
            for flag in (True, False)
        }
        answers = {
            flag: attack.ask(select(attempts, places), flag) for flag, places in parts.items()
        }
        order = torch.cat([parts[True], parts[False]]).argsort()
        logits, loss = (torch.cat([answers[True][i], answers[False][i]])[order] for i in (0, 1))  # type: ignore[list-item]
        with_grad = answers[True].grad
        assert with_grad is not None
        grad = torch.zeros_like(attempts["point"]).index_copy_(0, parts[True], with_grad)
        return Answer(logits, loss, grad, answers[True].asked), want

    def _count(self, attempts: Attempts, answer: Answer, wanted_grad: Tensor) -> None:
        """Passes made, and what the flags are about."""
        at_work = ~attempts["over"]
        attempts["forwards"] = attempts["forwards"] + answer.asked * at_work
        attempts["backwards"] = attempts["backwards"] + answer.asked * (at_work & wanted_grad)
        loss, first = answer.loss.to(attempts["loss_best"].dtype), attempts["queries"] == 0
        if answer.grad is not None:
            zero = (answer.grad.flatten(1) == 0).all(1)
            attempts["zero_gradient"] = torch.where(
                first & wanted_grad, zero, attempts["zero_gradient"]
            )
        late = (attempts["queries"] + 1 > LATE * self.attack.max_queries) & (
            attempts["queries"] > 0
        )
        attempts["loss_first"] = torch.where(first, loss, attempts["loss_first"])
        attempts["loss_best"] = torch.where(
            at_work, attempts["loss_best"].maximum(loss), attempts["loss_best"]
        )
        attempts["loss_late"] = torch.where(late, attempts["loss_late"], attempts["loss_best"])

    def _judge(self, attempts: Attempts, answer: Answer, fooled: Tensor) -> Tensor:
        """Keep the candidate; (R,) bool: nothing is left to look for."""
        fooled, point = fooled & ~attempts["over"], attempts["point"]
        first_time = fooled & ~attempts["found"]
        attempts["found_at"] = torch.where(
            first_time, attempts["queries"] + answer.used - 1, attempts["found_at"]
        )
        attempts["found"] = attempts["found"] | fooled
        if self.attack.keeps == "last":
            return torch.zeros_like(fooled)
        if not self.keeps_best:
            attempts["candidate"] = where(first_time, point, attempts["candidate"])
            return attempts["found"]
        if self._confirms:
            fooled = self._confirmed(attempts, fooled)
        count = self._of_unit(fooled.long())
        score = self._of_unit(
            self.attack.score(attempts, answer.loss).to(attempts["best_score"].dtype)
        )
        better = (count > attempts["best_count"]) | (
            (count == attempts["best_count"]) & (score > attempts["best_score"])
        )
        better = (
            better
            & ~attempts["over"]
            & ((attempts["queries"] > 0) | (not self.attack.starts_clean))
        )
        attempts["candidate"] = where(better, point, attempts["candidate"])
        attempts["best_count"], attempts["best_score"] = (
            torch.where(better, new, attempts[name])
            for name, new in (("best_count", count), ("best_score", score))
        )
        if self.attack.keeps == "best":
            return torch.zeros_like(fooled)
        return count == self._of_unit(attempts["clean_correct"].long())

    def _confirmed(self, attempts: Attempts, fooled: Tensor) -> Tensor:
        """(R,) bool: of the rows that fooled the search, those that fool the judging model, too;
        whole units are shown to it."""
        part = {name: attempts[name] for name in JUDGED if name in attempts}
        asked = torch.ones_like(fooled) if self.fixed else self._of_unit(fooled.long()) > 0
        if not self.fixed:
            part = select(part, asked)
            if not len(part["label"]):
                return fooled
        verdict = self.attack.fooled(
            self.attack.attacked_model.judge(self.attack.ball(part).tighten(part["point"])), part
        )
        attempts["forwards"] = attempts["forwards"] + (asked & ~attempts["over"])
        return fooled & (
            verdict if self.fixed else torch.zeros_like(fooled).masked_scatter(asked, verdict)
        )

    def _of_unit(self, values: Tensor) -> Tensor:
        """Summed over rows that count together."""
        return (
            values.view(-1, self.unit).sum(1).repeat_interleave(self.unit)
            if self.coupled_by_model
            else values
        )

    def _place(self, owners: list[Owner], parts: list[Attempts]) -> None:
        if not owners:
            return
        free = [place for place, owner in enumerate(self.owners) if owner is None]
        new = joined(parts)
        if len(owners) > len(free):
            old = [place for place, owner in enumerate(self.owners) if owner is not None]
            kept = select(self.attempts, self._row_numbers(old)) if old else None
            self.attempts = joined([kept, new]) if kept else new
            self.owners = [*(self.owners[place] for place in old), *owners]
            if self.fixed:
                self._compact(min(self.size, _power_of_two(len(self.owners))))
            return
        places = free[: len(owners)]
        self.attempts = replaced(self.attempts, self._row_numbers(places), new)
        for place, owner in zip(places, owners, strict=True):
            self.owners[place] = owner

    def _compact(self, target: int) -> None:
        """Units at work first, then as many idle ones as make ``target``."""
        busy = [place for place, owner in enumerate(self.owners) if owner is not None]
        places = busy + [busy[0] if busy else 0] * (target - len(busy))
        self.attempts = select(self.attempts, self._row_numbers(places)) if target else {}
        self.owners = [self.owners[place] for place in busy] + [None] * (target - len(busy))

    def _row_numbers(self, places: list[int]) -> Tensor:
        device = self.attempts["label"].device
        first = torch.tensor(places, dtype=torch.int64, device=device) * self.unit
        return (first.unsqueeze(1) + torch.arange(self.unit, device=device)).flatten()


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0
