"""Two files of rows, row by row: the ratio of each figure, and whether it is more than noise."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.reading.figures import SHARE, TIME, WORDS, Figure, Reading, Row
from ironmoe.bench.benchmarks.reading.files import Key, ReadRows, RowsError, read_rows
from ironmoe.bench.benchmarks.reading.kinds import Kind, text_of

# Two runs of one command on one machine differ by about as much when its clock, its other work and
# the layout of memory differ. Assumed, and not scattered over the runs within one command.
DRIFT = 0.05
MOST_LISTED = 20  # names in a message
SAME, AS_OTHERS = "within noise", "as others"


class Change(NamedTuple):
    """One figure of one row in both files.

    others: B / A of the times of code that is not ironmoe's and took turns with it: they show what
    the machine did, because that code is the same.
    """

    kind: Kind
    key: Key
    figure: Figure
    a: Reading
    b: Reading
    others: tuple[float, ...] = ()

    @property
    def who(self) -> str:
        """Whose row it is."""
        return self.key[self.kind.keys.index(self.kind.who)]

    @property
    def is_ours(self) -> bool:
        return self.who.startswith(OURS)

    @property
    def turns(self) -> Key:
        """What is the same of rows that were measured in turns."""
        return tuple(
            value
            for name, value in zip(self.kind.keys, self.key, strict=True)
            if name != self.kind.who
        )

    @property
    def change(self) -> float:
        """B / A; of a share, B − A. NaN where A is 0."""
        if self.figure.sort == SHARE:
            return self.b.value - self.a.value
        return self.b.value / self.a.value if self.a.value else math.nan

    @property
    def noise(self) -> float | None:
        """By how much B must differ from A so that their ranges are apart: how far the runs of the
        smaller one lie above it, and those of the larger one below it. As a share of A, as the
        change is; of a share such as robust accuracy, itself. None where an end is unknown, or A
        is 0."""
        smaller, larger = sorted((self.a, self.b), key=lambda reading: reading.value)
        end, start = smaller.assumed_high, larger.low
        whole = 1.0 if self.figure.sort == SHARE else self.a.value
        if end is None or start is None or not whole:
            return None
        return max((end - smaller.value) + (larger.value - start), 0.0) / whole

    @property
    def verdict(self) -> str:
        """ "slower", "faster", … if B differs from A by more than the noise, and of a measured
        figure also by more than DRIFT; "within noise" if not, and nothing where the noise is
        unknown."""
        is_share = self.figure.sort == SHARE
        if self.noise is None:
            return ""
        if abs(self.change - (not is_share)) <= max(self.noise, 0.0 if is_share else DRIFT):
            return SAME
        larger, smaller = WORDS[self.figure.sort]
        word = larger if self.b.value > self.a.value else smaller
        if is_share:
            return word
        slowest, fastest = max((1.0, *self.others)), min((1.0, *self.others))
        explained = fastest / (1 + DRIFT) <= self.change <= slowest * (1 + DRIFT)
        return AS_OTHERS if explained else word


class Mean(NamedTuple):
    """The geometric mean of B / A over rows, or the mean of B − A of shares. who: whose rows."""

    kind: Kind
    figure: Figure
    who: str
    rows: int
    change: float


class Comparison(NamedTuple):
    """changes: of every row that both have; only_a, only_b: kind and key of rows that one has."""

    a: ReadRows
    b: ReadRows
    changes: list[Change]
    only_a: list[tuple[Kind, Key]]
    only_b: list[tuple[Kind, Key]]

    def means(self) -> list[Mean]:
        groups: dict[tuple[str, str, str], list[Change]] = {}
        for change in self.changes:
            if not math.isnan(change.change):
                name = change.kind.name, change.figure.name, change.who
                groups.setdefault(name, []).append(change)
        return [
            Mean(group[0].kind, group[0].figure, who, len(group), mean_change(group))
            for (_, _, who), group in groups.items()
        ]


def compare_files(a: Path, b: Path, only: Iterable[str] = ()) -> Comparison:
    """Read both and match their rows.

    Args:
        only: texts; a row counts if each is part of a value of its key, or of the name of its
            layer, in any case.

    Raises:
        RowsError: a file has no rows, both are one file, or no row of A is in B.
    """
    if a.exists() and b.exists() and a.samefile(b):
        raise RowsError(f"A and B must be two files, got {a} twice")
    first, second = selected(read_rows(a), only), selected(read_rows(b), only)
    if first.rows == second.rows and first.facts == second.facts:
        raise RowsError(f"{b} is a copy of {a}: there is nothing to compare")
    check_kinds(first, second)

    changes = []
    only_a: list[tuple[Kind, Key]] = []
    only_b: list[tuple[Kind, Key]] = []
    for kind in dict.fromkeys([*first.kinds, *second.kinds]):
        there, here = first.rows.get(kind.name, {}), second.rows.get(kind.name, {})
        only_a += [(kind, key) for key in there if key not in here]
        only_b += [(kind, key) for key in here if key not in there]
        for figure in kind.figures:
            for key in there:
                if key in here:
                    one, other = figure.of(there[key]), figure.of(here[key])
                    if one is not None and other is not None:
                        changes.append(Change(kind, key, figure, one, other))

    changes = _beside_others(changes)
    if not changes:
        raise RowsError(f"no row of {a} is in {b}: {_why_apart(only_a, only_b)}")
    return Comparison(first, second, changes, only_a, only_b)


def _beside_others(changes: list[Change]) -> list[Change]:
    """The changes with those of others that took turns with them."""
    groups: dict[tuple[str, Key], list[Change]] = {}
    for change in changes:
        if change.figure.sort == TIME and change.kind.has_others:
            groups.setdefault((change.figure.name, change.turns), []).append(change)
    return [
        change._replace(
            others=tuple(
                other.change
                for other in groups.get((change.figure.name, change.turns), ())
                if other is not change and not other.is_ours and not math.isnan(other.change)
            )
        )
        for change in changes
    ]


def selected(file: ReadRows, only: Iterable[str]) -> ReadRows:
    """The rows whose key or name has all of these texts.

    Raises:
        RowsError: there is none.
    """
    texts = [text.lower() for text in only]
    rows = {
        name: kept
        for name, of_kind in file.rows.items()
        if (kept := {k: runs for k, runs in of_kind.items() if _has(_names(k, runs), texts)})
    }
    if not rows:
        there = dict.fromkeys(
            name
            for of_kind in file.rows.values()
            for key, runs in of_kind.items()
            for name in _names(key, runs)
            if name
        )
        raise RowsError(
            f"--only must be part of what names a row of {file.path}, got "
            f"{' and '.join(map(repr, only))}; names are {_listed(there)}"
        )
    return file._replace(rows=rows)


def check_kinds(first: ReadRows, *others: ReadRows) -> None:
    """RowsError: two files have no kind of rows in common."""
    for other in others:
        if not first.rows.keys() & other.rows.keys():
            names = [" and ".join(file.rows) for file in (first, other)]
            raise RowsError(
                f"both files must be of one benchmark: {first.path} has rows of {names[0]}, "
                f"{other.path} of {names[1]}"
            )


def _names(key: Key, runs: list[Row]) -> list[str]:
    """The values of a key, and what the layer was called when it was measured."""
    return [*key, *dict.fromkeys(text_of(row["name"]) for row in runs if row.get("name"))]


def _has(names: list[str], texts: list[str]) -> bool:
    return all(any(text in name.lower() for name in names) for text in texts)


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    more = f" and {len(first) - MOST_LISTED} more" if len(first) > MOST_LISTED else ""
    return "; ".join(first[:MOST_LISTED]) + more


def mean_change(changes: list[Change]) -> float:
    """The geometric mean of B / A, or the mean of B − A of shares."""
    values = [change.change for change in changes]
    if changes[0].figure.sort == SHARE:
        return fmean(values)
    return math.exp(fmean(map(math.log, values))) if min(values) > 0 else math.nan


def _why_apart(only_a: list[tuple[Kind, Key]], only_b: list[tuple[Kind, Key]]) -> str:
    """Which parts of the keys have no value in common."""
    reasons = []
    for kind in dict.fromkeys(kind for kind, _ in only_a):
        a = [key for of, key in only_a if of is kind]
        b = [key for of, key in only_b if of is kind]
        for index, name in enumerate(kind.keys):
            there, here = ({key[index]: None for key in keys} for keys in (a, b))
            if there and here and not there.keys() & here.keys():
                reasons.append(f"{name} is {_some(there)} in A, {_some(here)} in B")
    return "; ".join(reasons) or "no two of them are named alike"


def _some(values: Iterable[str]) -> str:
    first, *rest = values
    return f"{first} and {len(rest)} more" if rest else first
