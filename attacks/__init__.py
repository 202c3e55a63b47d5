"""Models in, adversarial examples and robustness reports out."""

from ironmoe.attacks.attack import Attack, AttackResult
from ironmoe.attacks.evaluate import AttackSummary, RobustnessReport, evaluate
from ironmoe.attacks.pgd import FGSM, PGD
from ironmoe.attacks.proportion import Proportion

__all__ = ["FGSM", "PGD", "Attack", "AttackResult", "AttackSummary", "Proportion", "RobustnessReport", "evaluate"]
