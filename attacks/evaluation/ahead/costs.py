"""How many passes and how long it takes at most, and how long attacks take that were measured."""

import math
from collections.abc import Callable
from functools import cached_property

from ironmoe.attacks.engine.budget import Pace
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.evaluation.ahead.rest import Ahead, Amounts

# A query with a gradient takes about as long as so many forward passes: one, and two backwards.
WITH_GRADIENT = 3
# An attack that has asked nothing yet is guessed from the others: its cost may be off by this much.
GUESS = 2.0
# In a batch of so many rows an attack asks about no more points than it needs.
MANY_ROWS = 1 << 20
# Candidates wait for their verdict until they are so large a share of the batch they came from.
SHARE_JUDGED = 1 / 5


class Costs:
    """What that costs at most, from what was measured.

    Args:
        undecided: how many images there are to attack.
        seconds: how long the engine has worked.
    """

    def __init__(self, engine: Engine, undecided: int, seconds: float) -> None:
        self.engine = engine
        self.undecided = undecided
        self.rows = min(undecided, engine.batch_size)
        self.paces: dict[Search, list[Pace]] = {}
        for (attack, _), batch in engine.batches.items():
            if batch.pace.is_known:
                self.paces.setdefault(attack, []).append(batch.pace)

        # Reading images, the journal, and all else goes with the predictions that count.
        self.judging = engine.judge.pace
        measured = [self.judging, *(pace for each in self.paces.values() for pace in each)]
        around = seconds - sum(pace.seconds for pace in measured)
        verdicts = self.judging.forwards / engine.judge.passes
        self.around_a_verdict = max(0.0, around) / max(verdicts, 1.0)

    def forwards(self, ahead: Ahead) -> int:
        """Forward passes of single images, at most."""
        counts = ahead.queries
        return counts[None] + sum(self._forwards(attack, ahead) for attack in _attacks(counts))

    def seconds(self, ahead: Ahead) -> float:
        """Seconds, at most."""
        attacks = _attacks(ahead.queries)
        total = sum(self._seconds(attack, ahead) for attack in attacks)
        passes = ahead.queries[None]
        if not self.judging.is_known or not passes:
            return total

        # Full batches of verdicts, and others after rounds of batches that were not full.
        verdicts = math.ceil(passes / self.engine.judge.passes)
        full = math.ceil(verdicts / self.engine.batch_size)
        few = math.ceil(full / SHARE_JUDGED) + ahead.rounds.total()
        rounds = full + sum(self._rounds(attack, ahead) for attack in attacks)
        calls = min(verdicts, min(few, rounds) + len(self.engine.batches))
        total += self.around_a_verdict * verdicts
        return total + self.judging.longest(calls, passes)

    def shortest(self, passes: int) -> float:
        """Seconds that so many passes of predictions that count take at least."""
        if not self.judging.is_known:
            return 0.0
        calls = passes / (self.engine.judge.passes * self.engine.batch_size)
        return self.judging.shortest(calls, passes)

    def of_verdicts(self, count: float) -> float:
        """Seconds that so many take, with all that is around them, as those before."""
        passes = self.engine.judge.passes
        known = self.judging.seconds / max(self.judging.forwards, 1) * passes
        return (known + self.around_a_verdict) * count

    def _rounds(self, attack: Search, ahead: Ahead) -> int:
        """Rounds: those that one image needs, and while images wait for a place, full ones."""
        queries, rounds = ahead.queries[attack], ahead.rounds[attack]
        if self._most_at_once(attack) > self.engine.batch_size:
            rounds += math.ceil(queries / self.engine.batch_size)
        return min(rounds, queries)

    def _most_at_once(self, attack: Search) -> int:
        """Attempts that could run side by side if there were places for all."""
        return self.undecided * attack.restarts * max(1, attack.targets)

    def _forwards(self, attack: Search, ahead: Ahead) -> int:
        """Some attacks ask about more points at once where a batch has room for them."""
        queries = ahead.queries[attack]
        each, one = self.passes(attack, self.rows), self.passes(attack, 1)
        passes = each * queries
        if one > each:
            places = min(self.engine.batch_size, self._most_at_once(attack))
            of_rounds = [count * self.passes(attack, count) for count in range(1, places + 1)]
            # There is room in the rounds of a batch that nothing waits for.
            room = max(all_of_it - each * count for count, all_of_it in enumerate(of_rounds, 1))
            passes = min(
                one * queries,
                each * queries + max(room, 0) * ahead.rounds[attack],
                max(of_rounds) * self._rounds(attack, ahead),
            )
        # A GPU computes a power of two of places, at most twice as many as are taken.
        return passes if self.engine.kind == "cpu" else 2 * passes

    def passes(self, attack: Search, rows: int) -> int:
        """How many forward passes a query makes, in a batch of so many."""
        confirms = attack.attacked_model.searches_another_model
        return attack.passes_per_query(rows, self.engine.kind) + confirms

    def _seconds(self, attack: Search, ahead: Ahead) -> float:
        rounds, forwards = self._rounds(attack, ahead), self._forwards(attack, ahead)
        if attack in self.paces:
            return max(pace.longest(rounds, forwards) for pace in self.paces[attack])
        return GUESS * self._guess(attack, rounds, forwards, Pace.longest)

    def likely(self, attack: Search, rounds: float, forwards: float) -> float:
        """Seconds of so many rounds with so many forward passes, where some attack is known."""
        if attack in self.paces:
            pace = max(self.paces[attack], key=lambda pace: pace.seconds)
            return pace.likely(rounds, forwards)
        return self._guess(attack, rounds, forwards, Pace.likely)

    def _guess(
        self,
        attack: Search,
        rounds: float,
        forwards: float,
        time_of: Callable[[Pace, float, float], float],
    ) -> float:
        """The time of an attack that has asked nothing yet, from those that have."""
        if not self._calls.is_known:
            return 0.0
        weight = WITH_GRADIENT if attack.gradient else 1
        calls = rounds * self.passes(attack, MANY_ROWS)
        return weight * time_of(self._calls, calls, forwards)

    @cached_property
    def _calls(self) -> Pace:
        """How long a call of the model takes without a gradient, from what was measured."""
        calls = Pace()
        for attack, paces in self.paces.items():
            for pace in paces:
                weight = WITH_GRADIENT if attack.gradient else 1
                calls.join(pace, calls=attack.eot, weight=weight)
        if not self.paces:
            calls.join(self.judging, calls=self.engine.judge.passes, weight=1)
        return calls


def _attacks(counts: Amounts) -> list[Search]:
    return [attack for attack, count in counts.items() if attack is not None and count > 0]
