"""The certificate of one image: what the votes over its copies prove (Cohen, Rosenfeld & Kolter,
arXiv 1902.02918, section 3.2, CERTIFY)."""

from dataclasses import dataclass
from statistics import NormalDist

from ironmoe.attacks.certificates.binomial import lower_bound
from ironmoe.attacks.certificates.voting import Tally, ranked

ABSTAINS = -1
"""The prediction of a smoothed model that does not name a class."""


@dataclass(frozen=True)
class Certificate:
    """What is proved of one image.

    index: its number in the data
    label: its class
    prediction: the class that the smoothed model gives it; −1: it abstains
    choice: the class of most votes in the first draw, whether it could be proved or not
    count: how many of the ``samples`` copies of the second draw the model gave this class
    samples: n of the paper
    p_low: with a confidence of 1 − alpha, the model gives the class to at least this share of all
        noisy copies
    radius: in L2 and in the units of the images; the smoothed model gives its prediction to every
        image that is less far away. 0 where it abstains
    right: the prediction is the label
    """

    index: int
    label: int
    prediction: int
    choice: int
    count: int
    samples: int
    p_low: float
    radius: float
    right: bool

    @property
    def abstains(self) -> bool:
        """No class could be proved to have more than half of the votes."""
        return self.prediction == ABSTAINS


def certificate_of(tally: Tally, sigma: float, alpha: float) -> Certificate:
    """The certificate after all votes. ``tally`` has two draws: the first one chooses the class,
    the second one says how many votes it has. One draw for both would choose the luckiest class and
    believe its luck."""
    selection, estimate = tally.votes
    choice, _ = ranked(selection)[0]
    samples = estimate.total()
    count = estimate[choice]
    p_low = lower_bound(count, samples, alpha)

    abstains = p_low < 0.5
    prediction = ABSTAINS if abstains else choice
    return Certificate(
        index=tally.example,
        label=tally.label,
        prediction=prediction,
        choice=choice,
        count=count,
        samples=samples,
        p_low=p_low,
        radius=0.0 if abstains else sigma * NormalDist().inv_cdf(p_low),
        right=prediction == tally.label,
    )


def largest_radius(sigma: float, samples: int, alpha: float) -> float:
    """The radius where all votes agree; no certificate reaches further."""
    p_low = lower_bound(samples, samples, alpha)
    return sigma * NormalDist().inv_cdf(p_low) if p_low >= 0.5 else 0.0
