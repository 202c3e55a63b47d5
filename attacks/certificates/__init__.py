"""Certificates: what is proved of a smoothed model, and what an attack leaves of it.

Read in this order:

1. ``arguments``, ``binomial`` and ``noise``: what callers give, tails of votes, and the copies
   that vote.
2. ``voting`` and ``certificate``: copies in, votes out; what votes prove.
3. ``everywhere`` and ``separate``: what every process does on its share, and which models have no
   certificate.
4. ``journal``, ``certification``, ``report`` and ``certify``: a data set in, a report out.
5. ``predict``, ``smoothed``, ``curve`` and ``attack_curve``: the smoothed model as a
   classifier, and under attack.

docs/certificates.md says what a certificate means.
"""

from ironmoe.attacks.certificates.attack_curve import attack_curve
from ironmoe.attacks.certificates.certificate import Certificate
from ironmoe.attacks.certificates.certify import certify
from ironmoe.attacks.certificates.curve import (
    AttackCurve,
    Bracket,
    Fate,
    certified_and_attacked,
)
from ironmoe.attacks.certificates.predict import predict
from ironmoe.attacks.certificates.report import CertificationReport
from ironmoe.attacks.certificates.smoothed import Smoothed

__all__ = [
    "AttackCurve",
    "Bracket",
    "Certificate",
    "CertificationReport",
    "Fate",
    "Smoothed",
    "attack_curve",
    "certified_and_attacked",
    "certify",
    "predict",
]
