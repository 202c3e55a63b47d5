"""The rows of the tables of ``ironmoe attack``, and the columns that show them.

A column is declared here and nowhere else: its header, its text on the terminal and in
report.html, its keys in report.json.
"""

from typing import Any, NamedTuple

from ironmoe.attacks.evaluation.findings.accuracy import (
    Accuracy,
    AccuracyRange,
    Known,
    numbers_of,
)
from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.cells import brackets, percent, speed
from ironmoe.bench.reports.tables import Column

WORST_CASE = "worst case"


class RobustnessRow(NamedTuple):
    """What held against one attack at one eps.

    attack: empty in the rows of the worst case, in which an image counts as robust only if it held
    against every attack; robust: the accuracy if all undecided images hold; fell, undecided:
    images, of which the undecided ones may fall when the run goes on.
    """

    attack: str
    eps_255: float
    robust: Known
    fell: int
    undecided: int

    @property
    def accuracy(self) -> Accuracy:
        """A range where images are undecided."""
        return AccuracyRange(self.robust, self.undecided) if self.undecided else self.robust

    @property
    def least(self) -> float:
        """The share that would be left if everything undecided fell."""
        return self.accuracy.least.value

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, which allows for every way in which undecided images may turn out."""
        return self.accuracy.interval()

    @property
    def share(self) -> str:
        return percent(self.accuracy)

    @property
    def brackets(self) -> str:
        return brackets(self.interval)

    @property
    def numbers(self) -> dict[str, Any]:
        """For report.json."""
        return numbers_of(self.accuracy)


class Cost(NamedTuple):
    """What one attack found and cost, over all eps and all runs.

    found: images for which the search reported a success
    confirmed: those whose success was confirmed by predicting again
    images_per_second: images decided, over the attack's part of the common time; None if it decided
        no image or asked the model nothing
    forwards, backwards: passes of single images
    """

    attack: str
    found: int
    confirmed: int
    images_per_second: float | None
    forwards: int
    backwards: int


RESULT_COLUMNS: tuple[Column[RobustnessRow], ...] = (
    Column("attack", lambda row: row.attack or WORST_CASE),
    Column("eps/255", lambda row: exact(row.eps_255), lambda row: {"eps_255": row.eps_255}),
    Column(
        "robust accuracy",
        lambda row: f"{row.share} {row.brackets}",
        lambda row: row.numbers,
    ),
    Column("fell", lambda row: str(row.fell)),
    Column("undecided", lambda row: str(row.undecided)),
)

COST_COLUMNS: tuple[Column[Cost], ...] = (
    Column("attack", lambda cost: cost.attack),
    Column("found", lambda cost: str(cost.found), lambda cost: {"found": cost.found}),
    Column(
        "confirmed", lambda cost: str(cost.confirmed), lambda cost: {"confirmed": cost.confirmed}
    ),
    Column(
        "images/s",
        lambda cost: speed(cost.images_per_second),
        lambda cost: {"images_per_second": cost.images_per_second},
    ),
    Column("forwards", lambda cost: str(cost.forwards), lambda cost: {"forwards": cost.forwards}),
    Column(
        "backwards", lambda cost: str(cost.backwards), lambda cost: {"backwards": cost.backwards}
    ),
)
