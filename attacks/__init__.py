"""Models in, adversarial examples and robustness reports out."""

from ironmoe.attacks.attack import Attack, AttackResult
from ironmoe.attacks.evaluate import AttackSummary, RobustnessReport, evaluate
from ironmoe.attacks.pgd import FGSM, PGD
from ironmoe.attacks.proportion import Proportion
from ironmoe.attacks.statistics import AttackStatistics, attack_statistics
from ironmoe.attacks.vmoe_pgd import VMoEPGD

__all__ = [
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AttackStatistics",
    "AttackSummary",
    "Proportion",
    "RobustnessReport",
    "VMoEPGD",
    "attack_statistics",
    "evaluate",
]
