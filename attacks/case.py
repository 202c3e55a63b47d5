"""A case: what one image (or group of images) goes through, stage after stage, attempt after attempt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.rows import Rows


class Stage(NamedTuple):
    """One attack at one eps; None: the radius that came with the image."""

    attack: Attack
    eps: float | None = None


@dataclass
class Tried:
    """What came out of an attempt, predicted again in full precision. Lists have an entry for each image of the unit."""

    stage: int
    attempt: int
    score: float  # of attacks that keep the best; else 0
    points: Tensor
    success: list[bool]
    prediction: list[int]
    distance: list[float]
    steps: list[int]


@dataclass(eq=False)
class Case:
    """U images that must stay together (1 where images are independent) on their way through a chain of stages.

    images (U, …); and for each of them its label, number in the data, clean prediction, whether that is right, the radius that came
    with it (None: the stages have theirs), and the classes in the order of its clean logits, without the label
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
    stage: int = 0
    next_attempt: int = 0
    running: set[int] = field(default_factory=set)
    _end: int = 0  # attempts from here on are not made
    best: Tried | None = None
    forwards: list[int] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    zero_gradient: list[bool] = field(default_factory=list)
    loss_rising: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        units = len(self.labels)
        self.forwards, self.backwards = [1] * units, [0] * units
        self.found, self.zero_gradient, self.loss_rising = ([False] * units for _ in range(3))
        self._begin_stage()

    @property
    def attack(self) -> Attack:
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
        return self.attack.restarts * max(1, min(self.attack.targets, len(self.classes[0])))

    def targets_of(self, attempt: int) -> list[int]:
        """Target classes: the runner-up of the clean logits first, all restarts of a target before the next target."""
        if not self.attack.targets:
            return self.labels
        return [classes[attempt // self.attack.restarts] for classes in self.classes]

    @property
    def has_attempts_left(self) -> bool:
        return self.next_attempt < self._end

    def take_attempt(self) -> int:
        attempt = self.next_attempt
        self.next_attempt += 1
        self.running.add(attempt)
        return attempt

    def is_cancelled(self, attempt: int) -> bool:
        return attempt not in self.running

    @property
    def fell(self) -> bool:
        """Every image of the unit that was classified right is misclassified at once."""
        return self.best is not None and sum(self.best.success) == sum(self.correct)

    def note(
        self, found: list[int], forwards: list[int], backwards: list[int], zero_gradient: list[int], rising: list[int]
    ) -> None:
        """What one stretch of an attempt cost and showed, image by image."""
        for one in range(len(self.correct)):
            self.found[one] |= bool(found[one])
            self.forwards[one] += forwards[one]
            self.backwards[one] += backwards[one]
            self.zero_gradient[one] |= bool(zero_gradient[one])
            self.loss_rising[one] |= bool(rising[one])

    def note_cost(self, rows: Rows) -> None:
        """What an attempt cost that was cancelled."""
        for one, (forwards, backwards) in enumerate(zip(rows["forwards"].tolist(), rows["backwards"].tolist(), strict=True)):
            self.forwards[one] += forwards
            self.backwards[one] += backwards

    def settle(self, tried: Tried) -> bool:
        """Take note of an attempt that is over; True if that cancels others. A complete success cancels its later siblings; earlier
        ones go on, so that the answer does not depend on which of them happened to be sooner."""
        self.running.discard(tried.attempt)
        if self._better(tried):
            self.best = tried
        if sum(tried.success) == sum(self.correct) and not self.attack.exhaustive:
            self._end = min(self._end, tried.attempt)
            before = len(self.running)
            self.running = {attempt for attempt in self.running if attempt < tried.attempt}
            return len(self.running) < before
        return False

    @property
    def stage_is_over(self) -> bool:
        return not self.running and not self.has_attempts_left

    def next_stage(self) -> bool:
        """Go on to the next stage; False if there is none, or no need."""
        if self.fell or self.stage + 1 == len(self.stages):
            return False
        self.stage += 1
        self._begin_stage()
        return True

    def _begin_stage(self) -> None:
        self.next_attempt, self._end = 0, self.attempts

    def _better(self, tried: Tried) -> bool:
        """More images fooled at once; then, of successes the earliest (of an exhaustive attack the best), of failures the best or the last."""
        if self.best is None:
            return True
        mine, new = sum(self.best.success), sum(tried.success)
        if mine != new:
            return new > mine
        order = (tried.stage, tried.attempt) < (self.best.stage, self.best.attempt)
        if new and (not self.attack.exhaustive or tried.score == self.best.score):
            return order
        return (tried.score, not order) > (self.best.score, order)
