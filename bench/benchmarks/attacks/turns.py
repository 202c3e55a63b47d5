"""The runs of a contest: libraries take turns, and each run is kept when it is over."""

import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor, nn

from ironmoe.attacks import Proportion
from ironmoe.bench.benchmarks.attacks.contests import Contest
from ironmoe.bench.common.rows.found import are_times
from ironmoe.bench.common.rows.rows_file import Row, RowsFile

# a ratio is printed if robust accuracies differ by at most this: starts are random
AGREES = 0.02


class Turn(NamedTuple):
    """One run of one library, the first of which is number 0."""

    contest: Contest
    library: str
    number: int

    @property
    def label(self) -> str:
        """What people call it."""
        which = f", run {self.number + 1} of {self.contest.rounds}" * (self.contest.rounds > 1)
        return f"{self.contest.place}, {self.library}{which}"


def missing_turns(contest: Contest, kept: RowsFile) -> list[Turn]:
    """The runs that are still to be made: round by round, in a new random order each."""
    done = {library: _runs(kept.find(contest.key(library))) for library in contest.runs}
    return [
        Turn(contest, library, number)
        for number in range(contest.rounds)
        for library in random.sample(list(contest.runs), len(contest.runs))
        if number >= done[library]
    ]


def take(turn: Turn, model: nn.Module, x: Tensor, y: Tensor, kept: RowsFile) -> float:
    """Make the run, and write it into the rows of its contest. Returns its seconds."""
    start = time.perf_counter()
    held = turn.contest.runs[turn.library](model, x, y)
    seconds = time.perf_counter() - start

    contest = turn.contest
    key = contest.key(turn.library)
    before = kept.find(key)
    times = [*(before["times"] if before else ()), seconds]
    row = {
        "robust": Proportion(int(held.sum()), len(y)).as_dict(),
        "agreement": None,
        "seconds": median(times),
        "runs": len(times),
        "ratio": None,
        "times": times,
        "held": "".join("01"[bool(one)] for one in held),
    }
    kept.put(key, row)
    _compare(contest, kept)
    return seconds


def rows_of(contest: Contest, kept: RowsFile) -> Iterator[Row]:
    """The rows of the libraries, as far as they are there."""
    for library in contest.runs:
        if (row := kept.find(contest.key(library))) is not None:
            yield row


def _compare(contest: Contest, kept: RowsFile) -> None:
    """Write how the libraries compare with the base, once that has a run."""
    base = kept.find(contest.key(contest.base))
    if base is None:
        return
    for row in list(rows_of(contest, kept)):
        ours, theirs = base["held"], row["held"]
        same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        apart = abs(ours.count("1") - theirs.count("1")) / len(ours)
        ratio = row["seconds"] / base["seconds"] if apart <= AGREES else None
        found: dict[str, Any] = {"agreement": same, "ratio": ratio}
        if any(row[name] != value for name, value in found.items()):
            kept.put(contest.key(row["library"]), row | found)


def is_whole(row: Row) -> bool:
    """Whether a row has its figures, and they are those of its runs and images."""
    times, held, robust = (row.get(name) for name in ("times", "held", "robust"))
    if not isinstance(times, list) or not isinstance(held, str) or not isinstance(robust, dict):
        return False
    shares = Proportion(held.count("1"), len(held)).as_dict()
    return (
        bool(times)
        and are_times(times)
        and (row.get("runs"), row.get("seconds")) == (len(times), median(times))
        and set(held) <= {"0", "1"}
        and all(robust.get(name) == shares[name] for name in ("count", "total", "value"))
    )


def _runs(row: Row | None) -> int:
    return 0 if row is None else int(row["runs"])
