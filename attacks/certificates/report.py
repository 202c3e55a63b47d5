"""The report of certificates: how much of the data a smoothed model is proved to hold."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ironmoe.attacks.certificates.certificate import Certificate, largest_radius
from ironmoe.attacks.evaluation.proportion import Proportion

Family = Literal["each", "all"]

# The radii that are printed, in units of sigma.
STEP = 0.5


@dataclass(repr=False)
class CertificationReport:
    """What is proved of the smoothed model: the one that gives an image the class which the model
    gives to most of its noisy copies. It says nothing of the model itself.

    Every share has a Wilson interval over the images.

    certificates: one for each image, in the order of the data
    sigma: standard deviation of the noise, in the units of the images
    selection, samples: n₀ and n of the paper
    alpha: as it was chosen
    family: "each": each certificate fails with a probability of at most alpha; "all": any of them
        does
    seconds: how long this call took
    notes: what was seen of the model that a reader should know
    """

    certificates: list[Certificate]
    sigma: float
    selection: int
    samples: int
    alpha: float
    family: Family = "each"
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def smoothed_accuracy(self) -> Proportion:
        """How many images the smoothed model gives their label, proved at least at the image
        itself. An abstention is not right."""
        return self.certified_accuracy_at(0.0)

    def certified_accuracy_at(self, radius: float) -> Proportion:
        """How many images have a certificate for their label that reaches this far; the paper's
        "certified accuracy". It is a lower bound of the smoothed model's robust accuracy in L2."""
        if not radius >= 0:
            raise ValueError(f"radius must be at least 0, got {radius}")
        proved = sum(each.right and each.radius >= radius for each in self.certificates)
        return Proportion(proved, len(self.certificates))

    def certified_accuracy(self, radii: Sequence[float]) -> dict[float, Proportion]:
        """radius → share of the images; for a curve."""
        return {float(radius): self.certified_accuracy_at(float(radius)) for radius in radii}

    @property
    def abstentions(self) -> Proportion:
        """How many images got no class."""
        count = sum(each.abstains for each in self.certificates)
        return Proportion(count, len(self.certificates))

    @property
    def mean_radius(self) -> float:
        """The mean over all images, 0 for those that are wrong or have no certificate: the area
        under the curve of certified accuracy (the ACR of Zhai et al., arXiv 2001.02378)."""
        proved = [each.radius for each in self.certificates if each.right]
        return math.fsum(proved) / len(self.certificates)

    @property
    def alpha_of_each(self) -> float:
        """The probability with which one certificate may fail."""
        return self.alpha / len(self.certificates) if self.family == "all" else self.alpha

    @property
    def largest_radius(self) -> float:
        """How far a certificate reaches if all votes agree; more ``samples`` let it reach
        further."""
        return largest_radius(self.sigma, self.samples, self.alpha_of_each)

    @property
    def usual_radii(self) -> list[float]:
        """0, and multiples of sigma / 2 up to the largest radius."""
        step = STEP * self.sigma
        return [step * number for number in range(int(self.largest_radius / step) + 1)]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON, a row for each image among them."""
        curve = self.certified_accuracy(self.usual_radii)
        return {
            "certifies": self._certifies,
            "sigma": self.sigma,
            "selection": self.selection,
            "samples": self.samples,
            "alpha": self.alpha,
            "family": self.family,
            "smoothed": self.smoothed_accuracy.as_dict(),
            "abstentions": self.abstentions.as_dict(),
            "mean_radius": self.mean_radius,
            "largest_radius": self.largest_radius,
            "curve": [{"radius": radius} | share.as_dict() for radius, share in curve.items()],
            "seconds": self.seconds,
            "notes": [*self.notes, *self._hints],
            "images": [asdict(each) for each in self.certificates],
        }

    def __repr__(self) -> str:
        """What to read first; ``as_dict`` has all numbers."""
        count = len(self.certificates)
        lines = [
            self._certifies,
            f"smoothed accuracy {self.smoothed_accuracy} of {count} images, abstentions "
            f"{self.abstentions}",
        ]
        for radius, share in self.certified_accuracy(self.usual_radii[1:]).items():
            lines.append(f"certified accuracy {share} at radius {radius:.4g}")
        lines.append(
            f"mean radius {self.mean_radius:.4g}; no certificate of {self.samples:,} copies "
            f"reaches further than {self.largest_radius:.4g}"
        )
        return "\n".join([*lines, self._errors, *self._hints, *self.notes])

    @property
    def _certifies(self) -> str:
        return (
            "These certificates are about the smoothed model, a vote over Gaussian noise with "
            f"sigma {self.sigma:g}, and not about the model itself. They hold in L2, up to "
            "floating point (arXiv 2207.07209)."
        )

    @property
    def _errors(self) -> str:
        count = len(self.certificates)
        if self.family == "all":
            return f"With a probability of at least 1 − {self.alpha:g} none of {count} is wrong."
        return (
            f"Each fails with a probability of at most {self.alpha:g}: up to "
            f"{self.alpha * count:.2g} of {count} may be wrong."
        )

    @property
    def _hints(self) -> list[str]:
        """What to do where little is proved."""
        if 2 * self.abstentions.count <= len(self.certificates):
            return []
        return [
            "The model abstains on most images. An ordinary model certifies nothing: train with "
            f"Gaussian noise of the same sigma ({self.sigma:g}) added to the images."
        ]
