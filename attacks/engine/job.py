"""A case: what one image (or group of images) goes through, stage after stage, attempt after
attempt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.search import Search


class Stage(NamedTuple):
    """One attack at one eps; None: the radius that came with the image."""

    attack: Search
    eps: float | None = None


class Outcome(NamedTuple):
    """Where an attempt left one image: predicted again and measured again in full precision.

    score: of attacks that keep the best, else 0; steps: to success, −1 without
    """

    stage: int
    attempt: int
    score: float
    point: Tensor
    success: bool
    prediction: int
    distance: float
    steps: int


@dataclass(eq=False)
class Job:
    """U images that must stay together (1 where images are independent) on their way through a
    chain of stages.

    images (U, …); and for each of them its label, number in the data, clean prediction, whether
    that is right, the radius that came
    with it (None: the stages have theirs), and the classes in the order of its clean logits,
    without the label and without those that the model rules out with −∞
    joint: the images influence each other's predictions, so one attempt has to fool them all at
        once
    fell_before: those that fell at an earlier stage in a run that was interrupted
    """

    chain: int
    stages: Sequence[Stage]
    images: Tensor
    labels: list[int]
    numbers: list[int]
    correct: list[bool]
    clean_prediction: list[int]
    classes: list[list[int]]
    own_eps: list[float] | None
    coupled_by_model: bool
    stage: int
    fell_before: list[bool]
    next_attempt: int = 0
    running: set[int] = field(default_factory=set)
    outcomes: list[Outcome | None] = field(
        init=False
    )  # of each image the one that counts: where it fell, or the latest stage's best
    wanted: list[bool] = field(init=False)  # right, and not fallen at an earlier stage
    forwards: list[int] = field(init=False)
    backwards: list[int] = field(init=False)
    found: list[bool] = field(init=False)
    zero_gradient: list[bool] = field(init=False)
    loss_rising: list[bool] = field(init=False)
    _end: int = field(init=False)  # attempts from here on are not made

    def __post_init__(self) -> None:
        units = len(self.labels)
        self.forwards, self.backwards = [1] * units, [0] * units
        self.found, self.zero_gradient, self.loss_rising = ([False] * units for _ in range(3))
        self.outcomes = [None] * units
        self._begin_stage()

    @property
    def attack(self) -> Search:
        return self.stages[self.stage].attack

    @property
    def eps(self) -> list[float]:
        """The radius of each image at the present stage."""
        eps = self.stages[self.stage].eps
        if eps is not None:
            return [eps] * len(self.labels)
        assert self.own_eps is not None
        return self.own_eps

    @property
    def attempts(self) -> int:
        """Of the present stage: restarts × targets."""
        return self.attack.restarts * max(1, min(self.attack.targets, *map(len, self.classes)))

    def targets_of(self, attempt: int) -> list[int]:
        """Target classes: the runner-up of the clean logits first, all restarts of a target before
        the next target."""
        if not self.attack.targets:
            return self.labels
        return [classes[attempt // self.attack.restarts] for classes in self.classes]

    @property
    def attempts_left(self) -> int:
        return max(self._end - self.next_attempt, 0)

    def take_attempt(self) -> int:
        attempt = self.next_attempt
        self.next_attempt += 1
        self.running.add(attempt)
        return attempt

    def is_cancelled(self, attempt: int) -> bool:
        return attempt not in self.running

    @property
    def fell(self) -> bool:
        """Nothing is left to fool at this stage."""
        return all(not wanted or self._fell(one) for one, wanted in enumerate(self.wanted))

    def note(
        self,
        found: list[int],
        forwards: list[int],
        backwards: list[int],
        zero_gradient: list[int],
        rising: list[int],
    ) -> None:
        """What one stretch of an attempt cost and showed, image by image."""
        for one in range(len(self.correct)):
            self.found[one] |= bool(found[one])
            self.forwards[one] += forwards[one]
            self.backwards[one] += backwards[one]
            self.zero_gradient[one] |= bool(zero_gradient[one])
            self.loss_rising[one] |= bool(rising[one])

    def note_cost(self, attempts: Attempts) -> None:
        """What an attempt cost that does not run to its end."""
        for one, (forwards, backwards) in enumerate(
            zip(attempts["forwards"].tolist(), attempts["backwards"].tolist(), strict=True)
        ):
            self.forwards[one] += forwards
            self.backwards[one] += backwards

    def settle(self, new: list[Outcome]) -> bool:
        """Take note of an attempt that is over; True if that cancels others. What fools everything
        cancels later siblings; earlier ones go on, so that the answer does not depend on which of
        them happened to be sooner."""
        self.running.discard(new[0].attempt)
        everybody = range(len(new))
        for together in (
            [list(everybody)] if self.coupled_by_model else [[one] for one in everybody]
        ):
            if self._better(
                [new[one] for one in together], [self.outcomes[one] for one in together]
            ):
                for one in together:
                    if not self._settled[one]:
                        self.outcomes[one] = new[one]
        if not self.fell or self.attack.exhaustive:
            return False
        needed = [
            outcome.attempt
            for outcome, wanted in zip(self.outcomes, self.wanted, strict=True)
            if wanted and outcome
        ]
        self._end = min(self._end, max(needed, default=new[0].attempt))
        before = len(self.running)
        self.running = {attempt for attempt in self.running if attempt < self._end}
        return len(self.running) < before

    @property
    def stage_is_over(self) -> bool:
        return not self.running and not self.attempts_left

    def next_stage(self) -> bool:
        """Go on to the next stage; False if there is none, or no need."""
        if self.fell or self.stage + 1 == len(self.stages):
            return False
        self.stage += 1
        self._begin_stage()
        return True

    def _begin_stage(self) -> None:
        self.next_attempt, self._end = 0, self.attempts
        fell = [before or self._fell(one) for one, before in enumerate(self.fell_before)]
        self.wanted = [right and not gone for right, gone in zip(self.correct, fell, strict=True)]
        # An image that was wrong from the start moves only where it has to: in company, or by an
        # attack that moves all.
        moves_wrong = self.coupled_by_model or self.attack.attacks_wrong
        self._settled = [
            gone or not (right or moves_wrong)
            for right, gone in zip(self.correct, fell, strict=True)
        ]

    def _fell(self, one: int) -> bool:
        outcome = self.outcomes[one]
        return outcome is not None and outcome.success

    def _better(self, new: list[Outcome], old: list[Outcome | None]) -> bool:
        """More images fooled at once; then, of successes the earliest (of an exhaustive attack the
        best), of failures the best or the last."""
        known = [outcome for outcome in old if outcome is not None and outcome.stage == self.stage]
        if not known:
            return True
        mine, more = (sum(outcome.success for outcome in outcomes) for outcomes in (known, new))
        if mine != more:
            return more > mine
        order = new[0].attempt < known[0].attempt
        if more and (not self.attack.exhaustive or new[0].score == known[0].score):
            return order
        return (new[0].score, not order) > (known[0].score, order)
