"""What became of each image at each radius, as values in [0, 1].

This file alone says what a row of ``per_image`` means for an accuracy: 1 the image is right, 0 it
is not, None it is not known, because a budget ended the evaluation before it was decided, or
because the attack drove the model to NaN. Of a random model the value is how often a pass is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ironmoe.attacks.evaluation.findings.radius_text import check_radius
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
        """The numbers in the data of the images that count, ascending: of those that no attack
        skipped."""
        return sorted(
            number
            for number in self.first
            if not any(rows[number]["skipped"] for rows in self.rows.values())
        )

    @property
    def finite(self) -> list[int]:
        """``numbers``, and those of the images that an attack drove to NaN, ascending: of those for
        which the model is finite without an attack."""
        driven = {
            number
            for rows in self.rows.values()
            for number, row in rows.items()
            if row.get("skipped_under_attack")
        }
        return sorted(driven.union(self.numbers))

    @property
    def undecided(self) -> tuple[int, int]:
        """(how many (image, attack) pairs are undecided, how many there are)."""
        numbers = self.numbers
        open_ = [
            self.under(attack, self.radii[attack][-1], numbers).count(None) for attack in self.rows
        ]
        return sum(open_), len(open_) * len(numbers)

    @property
    def passes(self) -> int:
        """How many passes of the model each verdict rests on."""
        return max((row["passes"] for row in self.first.values()), default=1)

    @property
    def alike(self) -> float:
        """How many times as much a pass of a random model varies as one whose images draw for
        themselves."""
        return max((row.get("alike") or 1.0 for row in self.first.values()), default=1.0)

    def radii_of_all(self, attacks: Sequence[str]) -> list[float]:
        """The radii that all of these attacks were run at, ascending."""
        return sorted(set.intersection(*(set(self.radii[attack]) for attack in attacks)))

    def clean(self, numbers: Sequence[int]) -> Values:
        """Of each image, whether the clean prediction is right, or how often."""
        return [_clean(self.first[number]) for number in numbers]

    def under(self, attack: str, eps: float, numbers: Sequence[int]) -> Values:
        """Of each image, whether it held against the attack at this radius, or how often.
        ValueError: the attack was not run at this one."""
        return self.under_all([attack], eps, numbers)

    def under_all(
        self,
        attacks: Sequence[str],
        eps: float | None,
        numbers: Sequence[int],
        *,
        driven_fell: bool = False,
    ) -> Values:
        """Of each image, whether it held against all of the attacks; ``eps`` None: against each at
        its own largest radius. Of a random model, how often it is right under the attack that is
        best at it: one half of the passes chooses it, the other one counts.

        Args:
            driven_fell: an image that an attack drove to NaN fell there; else nothing is known.

        Raises:
            ValueError: an attack was not run at this radius.
        """
        radii = [self.radii[attack][-1] if eps is None else eps for attack in attacks]
        for attack, radius in zip(attacks, radii, strict=True):
            check_radius(radius, self.radii[attack])
        return [
            _least(
                [
                    _judged(self.rows[attack][number], radius, self.radii[attack], driven_fell)
                    for attack, radius in zip(attacks, radii, strict=True)
                ]
            )
            for number in numbers
        ]


def outcomes_of(report: RobustnessReport) -> Outcomes:
    """A report, image by image.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(report, RobustnessReport):
        raise TypeError(
            f"a report must be what evaluate returned, got {type(report).__name__}; several are "
            "compared two by two"
        )
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


def _clean(row: Row) -> float:
    if row["passes"] > 1:
        return float(row["right_second"][0] / (row["passes"] // 2))
    return float(row["clean_right"])


def _judged(
    row: Row, eps: float, radii: Sequence[float], driven_fell: bool
) -> tuple[float, float] | None:
    """(what chooses among attacks, what counts) of one image; None where it is not known."""
    fell = row["fell"] and row["eps"] <= eps
    held = row["held_at"] is not None and row["held_at"] >= eps
    if row["clean_right"] and not fell and not held:
        return (0.0, 0.0) if driven_fell and row.get("skipped_under_attack") else None
    if row["passes"] == 1:
        return float(held), float(held)

    point = 1 + sum(radius < eps for radius in radii)
    half = row["passes"] // 2
    return row["right_first"][point] / half, row["right_second"][point] / half


def _least(judged: Sequence[tuple[float, float] | None]) -> float | None:
    """An image that fell to one attack fell, whatever is not known of the others."""
    known = [each for each in judged if each is not None]
    if len(known) == len(judged) or (0.0, 0.0) in known:
        return min(known, key=lambda each: each[0])[1]
    return None
