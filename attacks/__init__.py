"""Models in, adversarial examples and robustness reports out."""

from ironmoe.attacks.apgd import APGD
from ironmoe.attacks.attack import Attack, AttackResult
from ironmoe.attacks.autoattack import AutoAttack
from ironmoe.attacks.batch_mates import BatchMates, BatchMatesResult
from ironmoe.attacks.carlini_wagner import CW
from ironmoe.attacks.checks import Flag, check_model
from ironmoe.attacks.deepfool import DeepFool
from ironmoe.attacks.evaluate import evaluate
from ironmoe.attacks.fab import FAB
from ironmoe.attacks.journal import JournalError
from ironmoe.attacks.outcome_checks import check_outcome
from ironmoe.attacks.pgd import FGSM, MIFGSM, PGD
from ironmoe.attacks.progress import Progress
from ironmoe.attacks.proportion import Proportion
from ironmoe.attacks.robustness import AttackSummary, RobustnessReport
from ironmoe.attacks.routing import RoutingMode
from ironmoe.attacks.routing_modes import (
    AuxiliaryLoss,
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingDivergence,
    Softened,
    StraightThrough,
)
from ironmoe.attacks.square import Square
from ironmoe.attacks.statistics import AttackStatistics, attack_statistics
from ironmoe.attacks.vmoe_pgd import VMoEPGD

__all__ = [
    "APGD",
    "CW",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AttackStatistics",
    "AttackSummary",
    "AutoAttack",
    "AuxiliaryLoss",
    "BatchMates",
    "BatchMatesResult",
    "DeepFool",
    "ExpertsOnly",
    "Flag",
    "FrozenRouting",
    "GatesOnly",
    "JournalError",
    "Progress",
    "Proportion",
    "RobustnessReport",
    "RoutingDivergence",
    "RoutingMode",
    "Softened",
    "Square",
    "StraightThrough",
    "VMoEPGD",
    "attack_statistics",
    "check_model",
    "check_outcome",
    "evaluate",
]
