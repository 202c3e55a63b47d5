"""What attacks did to a smoothed model at several radii, alone and beside its certificates."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ironmoe.attacks.certificates.report import CertificationReport
from ironmoe.attacks.evaluation.proportion import Proportion


@dataclass(frozen=True)
class Fate:
    """What became of one image.

    index: its number in the data
    label: its class
    prediction: the class that the smoothed model gives the clean image; −1: it abstains
    fell_at: the smallest radius at which the smoothed model was shown to name another class than
        the label, 0 for the clean image; infinity if it never was
    """

    index: int
    label: int
    prediction: int
    fell_at: float


@dataclass(repr=False)
class AttackCurve:
    """The robust accuracy of a smoothed model in L2, as far as an attack can tell: an upper bound.

    images: what became of each, in the order of the data
    radii: at which they were attacked, ascending
    sigma, samples, alpha: of the predictions that judge
    notes: what was seen of the model that a reader should know
    """

    images: list[Fate]
    radii: tuple[float, ...]
    sigma: float
    samples: int
    alpha: float
    notes: list[str] = field(default_factory=list)

    def accuracy_at(self, radius: float) -> Proportion:
        """How many images had not fallen at one of the radii, or at 0."""
        if radius not in (0, *self.radii):
            raise ValueError(f"radius must be 0 or one of {self.radii}, got {radius}")
        held = sum(image.fell_at > radius for image in self.images)
        return Proportion(held, len(self.images))

    @property
    def accuracies(self) -> dict[float, Proportion]:
        """radius → share of the images."""
        return {radius: self.accuracy_at(radius) for radius in self.radii}

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        curve = [{"radius": at} | share.as_dict() for at, share in self.accuracies.items()]
        images = [
            asdict(image) | {"fell_at": None if image.fell_at == float("inf") else image.fell_at}
            for image in self.images
        ]
        return {
            "sigma": self.sigma,
            "samples": self.samples,
            "alpha": self.alpha,
            "curve": curve,
            "notes": self.notes,
            "images": images,
        }

    def __repr__(self) -> str:
        lines = [
            f"The smoothed model (sigma {self.sigma:g}) under attack in L2, {len(self.images)} "
            "images; an upper bound of its robust accuracy."
        ]
        lines += [
            f"robust accuracy {share} at radius {radius:.4g}"
            for radius, share in self.accuracies.items()
        ]
        return "\n".join([*lines, *self.notes])


class Bracket(NamedTuple):
    """Between which shares the robust accuracy of a smoothed model lies at one radius:
    ``certified`` is proved, and ``attacked`` is what an attack left."""

    radius: float
    certified: Proportion
    attacked: Proportion


def certified_and_attacked(report: CertificationReport, curve: AttackCurve) -> Sequence[Bracket]:
    """Both curves side by side, at the radii of the attack.

    Raises:
        ValueError: they are about other images, or other noise.
    """
    if report.sigma != curve.sigma:
        raise ValueError(
            f"curve must have the same sigma as report, got {curve.sigma} and {report.sigma}"
        )
    images = [(image.index, image.label) for image in curve.images]
    if images != [(each.index, each.label) for each in report.certificates]:
        raise ValueError(
            f"curve must be about the same images as report, got {len(images)} and "
            f"{len(report.certificates)} of them, or other labels"
        )
    return [
        Bracket(radius, report.certified_accuracy_at(radius), share)
        for radius, share in curve.accuracies.items()
    ]
