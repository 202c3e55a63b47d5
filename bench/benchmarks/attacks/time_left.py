"""How long the runs that are left take: at most as long as if every image held."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ironmoe.bench.benchmarks.attacks.contests import IN_BFLOAT16, Contest
from ironmoe.bench.benchmarks.attacks.turns import Turn
from ironmoe.bench.common.durations import in_words, range_in_words
from ironmoe.bench.common.rows.remaining import Remaining

MOST_TIMED = 32  # images; a pass of one costs as much in a larger batch
Place = tuple[str, str]  # what is attacked how, and what the libraries are compared with


class TimeLeft:
    """The time of the runs that are left, from both ends.

    The upper end is that every image holds: the passes of the attack, each as long as one that was
    timed here. A library that has run is expected to take as long again. Others of its contest may
    take as long as it, and those of another contest no time at all.
    """

    def __init__(
        self, turns: Sequence[Turn], models: Mapping[str, nn.Module], x: Tensor, images: int
    ) -> None:
        """x: a batch of images, on which a pass of each model is timed; images: how many there
        are to attack."""
        self.turns = list(turns)
        self._took: dict[Place, dict[str, float]] = {}
        seconds = {
            kind: seconds_of_pass(models[kind[0]], x[:MOST_TIMED], kind[1])
            for kind in dict.fromkeys(map(_kind, turns))
        }
        self._most = {
            (_place(turn.contest), turn.library): seconds[_kind(turn)]
            * turn.contest.passes
            * min(turn.contest.images, images)
            for turn in turns
        }

    def note(self, turn: Turn, seconds: float) -> None:
        """A run is over."""
        self.turns.remove(turn)
        self._took.setdefault(_place(turn.contest), {})[turn.library] = seconds

    def ends(self) -> tuple[float, float]:
        """Seconds, at least and at most, about."""
        ends = [self._ends(turn) for turn in self.turns]
        return sum(low for low, _ in ends), sum(high for _, high in ends)

    def in_words(self) -> str:
        """ "2 min to 1.5 h", or "at most about 1.5 h" while nothing is known of the lower end."""
        least, most = self.ends()
        return range_in_words(least, most) if least else f"at most about {in_words(most)}"

    def _ends(self, turn: Turn) -> tuple[float, float]:
        took = self._took.get(_place(turn.contest), {})
        if turn.library in took:
            return took[turn.library], took[turn.library]
        low = min(took.values(), default=0.0)
        return low, max(low, self._most[_place(turn.contest), turn.library])


class EpochsLeft:
    """The time of the epochs that are left of several trainings."""

    def __init__(self, seconds: Mapping[str, float], epochs: int) -> None:
        """seconds: of an epoch of each model, in the order in which they are trained."""
        self._pace = Remaining(
            {(name, n): of for name, of in seconds.items() for n in range(1, epochs + 1)}
        )
        self._last = time.monotonic()

    def note(self, name: str, epoch: int) -> None:
        """An epoch is over. Those before it may be an earlier command's."""
        now = time.monotonic()
        self._pace.note((name, epoch), now - self._last)
        for earlier in range(1, epoch):
            self._pace.left.pop((name, earlier), None)
        self._last = now

    def in_words(self) -> str:
        """ "about 12 min", or "" when none is left."""
        return f"about {in_words(self._pace.seconds_left)}" if self._pace.left else ""


def _place(contest: Contest) -> Place:
    return contest.place, contest.base


def _kind(turn: Turn) -> tuple[str, bool]:
    """The model, and whether it computes in bfloat16."""
    return turn.contest.model, turn.library == IN_BFLOAT16


def seconds_of_pass(model: nn.Module, x: Tensor, in_bfloat16: bool = False) -> float:
    """Of one image in a batch, forward and backward."""
    images = x.clone().requires_grad_()
    seconds = 0.0
    for _ in range(2):  # the first one makes what the second finds
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bfloat16):
            output = model(images).float().sum()
        torch.autograd.grad(output, images)
        seconds = time.perf_counter() - start
    return seconds / len(x)
