"""What became of each image at each radius, as values in [0, 1].

This file alone says what a row of ``per_image`` means for an accuracy: 1 the image is right, 0 it
is not, None it is not known, because a budget ended the evaluation before it was decided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.results.image_rows import per_image
from ironmoe.attacks.results.rows_file import Row

CLEAN, WORST_CASE = "clean", "worst case"

Values = list[float | None]


@dataclass(frozen=True)
class Outcomes:
    """One evaluation, image by image.

    rows: attack → number of the image → its row
    radii: attack → the radii that it was run at, ascending
    complete: False if a budget ended the evaluation before every image was decided
    """

    rows: Mapping[str, Mapping[int, Row]]
    radii: Mapping[str, Sequence[float]]
    complete: bool = True

    @property
    def first(self) -> Mapping[int, Row]:
        """Number → row of the first attack, for what is the same under all of them."""
        return next(iter(self.rows.values()))

    @property
    def numbers(self) -> list[int]:
        """The images' numbers in the data, ascending."""
        return sorted(self.first)

    def radii_of_all(self, attacks: Sequence[str]) -> list[float]:
        """The radii that all of these attacks were run at, ascending."""
        return sorted(set.intersection(*(set(self.radii[attack]) for attack in attacks)))

    def clean(self, numbers: Sequence[int]) -> Values:
        """Of each image, whether the clean prediction is right."""
        return [float(self.first[number]["clean_right"]) for number in numbers]

    def under(self, attack: str, eps: float, numbers: Sequence[int]) -> Values:
        """Of each image, whether it held against the attack at this radius."""
        rows = self.rows[attack]
        return [_value(rows[number], eps) for number in numbers]

    def under_all(
        self, attacks: Sequence[str], eps: float | None, numbers: Sequence[int]
    ) -> Values:
        """Of each image, whether it held against all of the attacks; ``eps`` None: against each at
        its own largest radius."""
        of_attacks = [
            self.under(attack, self.radii[attack][-1] if eps is None else eps, numbers)
            for attack in attacks
        ]
        return [_least(values) for values in zip(*of_attacks, strict=True)]


def outcomes_of(report: RobustnessReport) -> Outcomes:
    """A report, image by image."""
    radii = {name: summary.eps for name, summary in report.attacks.items()}
    return outcomes_from(per_image(report), radii, report.complete and not report.unread)


def outcomes_from(
    rows: Sequence[Row], radii: Mapping[str, Sequence[float]], complete: bool
) -> Outcomes:
    """Rows of ``per_image``, of one evaluation."""
    by_attack: dict[str, dict[int, Row]] = {attack: {} for attack in radii}
    for row in rows:
        by_attack[row["attack"]][row["number"]] = row
    return Outcomes(by_attack, radii, complete)


def _value(row: Row, eps: float) -> float | None:
    if not row["clean_right"]:
        return 0.0
    if row["fell"] and row["eps"] <= eps:
        return 0.0
    return 1.0 if row["held_at"] is not None and row["held_at"] >= eps else None


def _least(values: Sequence[float | None]) -> float | None:
    """An image that fell to one attack fell, whatever is not known of the others."""
    known = [value for value in values if value is not None]
    if known and min(known) == 0:
        return 0.0
    return None if len(known) < len(values) else min(known)
