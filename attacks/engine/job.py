"""A job: what one unit of images goes through, stage after stage, attempt after attempt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ironmoe.attacks.engine.counters import Counters
from ironmoe.attacks.engine.search import Search

ONE_PASS = Counters(forwards=1)


class Stage(NamedTuple):
    """One attack at one eps; None: the radius that came with the image."""

    attack: Search
    eps: float | None = None


class Example(NamedTuple):
    """What is known of one image before it is attacked.

    number: its place in the data
    label, clean_prediction: classes; −1 where the goal is about something else
    clean_correct: the clean prediction is right
    classes: the other classes in the order of the clean logits, without those that the model rules
        out with −∞; as many as the attacks need
    eps: the radius that came with the image; None: the stages have theirs
    fell_before: the image fell at an earlier stage, in a run that was interrupted
    figure: the goal's figure for the clean image; NaN if it has none
    hits: how many passes of the clean image reached the goal, in each half of them
    is_bad: the model gave no finite output for the clean image
    """

    number: int
    label: int
    clean_prediction: int
    clean_correct: bool
    classes: list[int]
    eps: float | None
    fell_before: bool
    figure: float = math.nan
    hits: tuple[int, int] = (0, 0)
    is_bad: bool = False


class AttemptEnd(NamedTuple):
    """Where an attempt left one image: predicted again and measured again in full precision.

    fell: the image is fooled there, at a distance that counts
    score: the score of that point if the attack keeps the best one, else 0
    steps: how many queries came before the success; −1 without a success
    figure: the goal's figure there; NaN if it has none
    hits: how many passes reached the goal there, in each half of them
    """

    stage: int
    attempt: int
    score: float
    point: Tensor
    fell: bool
    prediction: int
    distance: float
    steps: int
    figure: float = math.nan
    hits: tuple[int, int] = (0, 0)


@dataclass(eq=False, kw_only=True)
class Job:
    """A unit of U images on its way through a chain of stages.

    Args:
        chain: the number of the chain.
        stages: the stages that the chain consists of.
        stage: the number of the present stage.
        images: (U, …), the clean images.
        labels: (U, …), what the goal is about.
        side: columns (U, …) that attempts carry with their image.
        examples: what is known of each of them.
        coupled_by_model: the images influence each other's predictions, so one attempt has to fool
            them all at once.
        first: what the clean prediction of each image cost.

    Attributes:
        ends: for each image the end that counts: where it fell, or the best of the latest stage.
        wanted: for each image, whether it is still to be fooled: right, and not fallen before.
        counters: for each image, what was counted so far.
        skipped: for each image, whether the model gives nothing finite for it, so that it counts as
            neither robust nor fallen.
        hits: for each image, how many passes of a random model reached the goal, in each half of
            them: at the clean image, and for each radius that is done at the best point so far, the
            one with the most hits in the first half.
        running: the numbers of the attempts that are under way.
    """

    chain: int
    stages: Sequence[Stage]
    stage: int
    images: Tensor
    labels: Tensor
    examples: Sequence[Example]
    coupled_by_model: bool
    side: Mapping[str, Tensor] = field(default_factory=dict)
    first: Counters = ONE_PASS
    next_attempt: int = 0
    running: set[int] = field(default_factory=set)
    ends: list[AttemptEnd | None] = field(init=False)
    wanted: list[bool] = field(init=False)
    counters: list[Counters] = field(init=False)
    skipped: list[bool] = field(init=False)
    hits: list[list[tuple[int, int]]] = field(init=False)
    _tests: int = 0
    _best_hits: list[tuple[int, int]] = field(init=False)
    _attempts_needed: int = field(init=False)
    _unchanging: list[bool] = field(init=False)  # images whose end no attempt replaces

    def __post_init__(self) -> None:
        self.ends = [None] * len(self.examples)
        self.counters = [self.first] * len(self.examples)
        self.skipped = [example.is_bad for example in self.examples]
        self.hits = [[example.hits] for example in self.examples]
        self._best_hits = [example.hits for example in self.examples]
        self._begin_stage()

    @property
    def is_random(self) -> bool:
        """Whether verdicts rest on many passes."""
        return self.first.forwards > 1

    @property
    def attack(self) -> Search:
        return self.stages[self.stage].attack

    @property
    def eps(self) -> list[float]:
        """The radius of each image at the present stage."""
        eps = self.stages[self.stage].eps
        radii = [example.eps if eps is None else eps for example in self.examples]
        return [radius for radius in radii if radius is not None]

    @property
    def attempt_count(self) -> int:
        """How many attempts the present stage makes: restarts × targets."""
        classes = min(len(example.classes) for example in self.examples)
        return self.attack.restarts * max(1, min(self.attack.targets, classes))

    def targets_of(self, attempt: int) -> list[int]:
        """Target classes: the runner-up of the clean logits first, all restarts of a target before
        the next target. The labels, where the attack has no targets."""
        if not self.attack.targets:
            return [example.label for example in self.examples]
        place = attempt // self.attack.restarts
        return [example.classes[place] for example in self.examples]

    @property
    def attempts_left(self) -> int:
        return max(self._attempts_needed - self.next_attempt, 0)

    def take_attempt(self) -> int:
        attempt = self.next_attempt
        self.next_attempt += 1
        self.running.add(attempt)
        return attempt

    def is_cancelled(self, attempt: int) -> bool:
        return attempt not in self.running

    def has_fallen(self, one: int) -> bool:
        """Whether this image fell at some stage of this run."""
        end = self.ends[one]
        return end is not None and end.fell

    @property
    def all_wanted_fell(self) -> bool:
        """Whether every wanted image has fallen, so that nothing is left to do at this stage."""
        return all(self.has_fallen(one) for one, is_wanted in enumerate(self.wanted) if is_wanted)

    def note(self, counters: Sequence[Counters]) -> None:
        """Add what an attempt, or a part of one, cost and showed, image by image."""
        self.counters = [
            known.plus(new) for known, new in zip(self.counters, counters, strict=True)
        ]

    def next_tests(self) -> list[int]:
        """For each image, how many tests were made at it before the one that comes now."""
        self._tests += 1
        return [self._tests] * len(self.examples)

    def skip(self, bad: Sequence[bool]) -> None:
        """Give up: the model gives nothing finite for these images, which nothing can be said of.
        Nor can it of others that are attacked together with them, since that ends, too."""
        everybody = len(self.examples) > 1
        self.skipped = [
            known or new or everybody for known, new in zip(self.skipped, bad, strict=True)
        ]
        self.running = set()
        self._attempts_needed = 0

    def settle(self, ends: Sequence[AttemptEnd]) -> bool:
        """Take note of an attempt that is over; True if that cancels others.

        An attempt that fools all wanted images cancels later ones. Earlier ones go on, so that the
        answer does not depend on which of them happened to end first.
        """
        attempt = ends[0].attempt
        self.running.discard(attempt)
        for one, end in enumerate(ends):
            if end.distance <= self.eps[one] and end.hits[0] > self._best_hits[one][0]:
                self._best_hits[one] = end.hits

        for together in self._judged_together():
            old = [self.ends[one] for one in together]
            if self._is_better([ends[one] for one in together], old):
                self._keep(ends, together)

        if not self.all_wanted_fell or self.attack.exhaustive:
            return False
        return self._cancel_needless(attempt)

    @property
    def stage_is_over(self) -> bool:
        return not self.running and not self.attempts_left

    def next_stage(self) -> bool:
        """Go on to the next stage; False if there is none, or no need."""
        is_last = self.all_wanted_fell or self.stage + 1 == len(self.stages)
        if is_last or self.stages[self.stage + 1].eps != self.stages[self.stage].eps:
            for known, best in zip(self.hits, self._best_hits, strict=True):
                known.append(best)
        if is_last:
            return False
        self.stage += 1
        self._begin_stage()
        return True

    def _begin_stage(self) -> None:
        self.next_attempt = 0
        self._attempts_needed = self.attempt_count

        fell = [
            example.fell_before or self.has_fallen(one) for one, example in enumerate(self.examples)
        ]
        right = [
            example.clean_correct and not skipped
            for example, skipped in zip(self.examples, self.skipped, strict=True)
        ]
        self.wanted = [
            is_right and not has_fallen for is_right, has_fallen in zip(right, fell, strict=True)
        ]

        # An image that was wrong from the start keeps its clean pixels, unless its group is judged
        # together or the attack moves every image.
        moves_wrong = self.coupled_by_model or self.attack.attacks_wrong
        self._unchanging = [
            has_fallen or not (is_right or moves_wrong)
            for is_right, has_fallen in zip(right, fell, strict=True)
        ]

    def _judged_together(self) -> list[list[int]]:
        """The images whose ends are compared as one: all, or each by itself."""
        everybody = list(range(len(self.examples)))
        return [everybody] if self.coupled_by_model else [[one] for one in everybody]

    def _is_better(self, new: Sequence[AttemptEnd], old: Sequence[AttemptEnd | None]) -> bool:
        """Whether the new ends are to be kept in place of the old ones."""
        known = [end for end in old if end is not None and end.stage == self.stage]
        if not known:
            return True

        fell_now = sum(end.fell for end in new)
        fell_before = sum(end.fell for end in known)
        if fell_now != fell_before:
            return fell_now > fell_before

        is_earlier = new[0].attempt < known[0].attempt
        score = new[0].score
        known_score = known[0].score

        # The earliest of the successes counts, so that it does not matter which came to its end
        # first. An exhaustive attack sees all of them, and takes the best.
        if fell_now and (not self.attack.exhaustive or score == known_score):
            return is_earlier

        # The best of the failures counts, and the last of those that are equally good.
        if score != known_score:
            return score > known_score
        return not is_earlier

    def _keep(self, ends: Sequence[AttemptEnd], together: list[int]) -> None:
        for one in together:
            if not self._unchanging[one]:
                self.ends[one] = ends[one]

    def _cancel_needless(self, attempt: int) -> bool:
        """Give up the attempts after the last one that fooled a wanted image; True if some of them
        were running."""
        needed = [
            end.attempt
            for end, is_wanted in zip(self.ends, self.wanted, strict=True)
            if is_wanted and end is not None
        ]
        self._attempts_needed = min(self._attempts_needed, max(needed, default=attempt))

        running_before = len(self.running)
        self.running = {other for other in self.running if other < self._attempts_needed}
        return len(self.running) < running_before
