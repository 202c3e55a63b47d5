"""How long the rows that are left will take."""

from collections.abc import Hashable, Mapping


class Remaining:
    """The time left, from what each row was expected to take and from what those so far took."""

    def __init__(self, expected: Mapping[Hashable, float]) -> None:
        """``expected``: seconds of each row, from a quick pass."""
        self.left = dict(expected)
        self.planned = 0.0
        self.took = 0.0

    def note(self, row: Hashable, seconds: float) -> None:
        """A row is done."""
        self.planned += self.left.pop(row)
        self.took += seconds

    @property
    def seconds_left(self) -> float:
        """The seconds that the others will take: longer than planned if the rows so far were."""
        return self._slower * sum(self.left.values())

    def seconds_of(self, row: Hashable) -> float:
        """The seconds that one of the others will take."""
        return self._slower * self.left[row]

    @property
    def _slower(self) -> float:
        return self.took / self.planned if self.planned > 0 else 1.0
