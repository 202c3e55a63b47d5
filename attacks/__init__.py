"""Models in, adversarial examples and robustness reports out.

Read in this order:

1. ``balls/``, ``losses``, ``ruled_out`` and ``random``: where adversarial examples may lie, what an
   attack raises, which classes cannot be, and random numbers that depend on the example
   alone. ``goals/``: what a success is.
2. ``engine/search``: what an attack is, as the engine sees it; then the rest of ``engine/``, whose
   docstring says what each file knows.
3. ``result``, ``run``, ``space``, ``aliases/`` and ``attack``: one batch in, an ``AttackResult``
   out; where an attack looks; what others call its arguments; the class that attacks derive from.
4. ``routing/``: what an attack may do to routing.
5. ``methods/``: the attacks, ``pgd`` first.
6. ``data/``: image files in, streams of pixels out; ``evaluation/``: a data set in, a
   ``RobustnessReport`` out.
7. ``results/``: reports as files, tables and comparisons.
8. ``universal/``: one perturbation for all images.
9. ``standard/`` and ``autoattack``: attacks one after another, with the official calls;
   ``robustbench/``: the call of RobustBench.
10. ``certificates/``: what is proved of a smoothed model.
11. ``smoothness/``: how smooth a model is, and where its routing makes it jump.

Imports go from later ones to earlier ones.
"""

from ironmoe.attacks.attack import Attack, FixedRadiusAttack, LeastDistanceAttack
from ironmoe.attacks.autoattack import AutoAttack
from ironmoe.attacks.balls.ball import Ball, register_norm
from ironmoe.attacks.certificates import (
    AttackCurve,
    Certificate,
    CertificationReport,
    Smoothed,
    attack_curve,
    certified_and_attacked,
    certify,
)
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.ensemble import Ensemble
from ironmoe.attacks.evaluation.checks.model_checks import check_model
from ironmoe.attacks.evaluation.checks.outcome_checks import check_outcome
from ironmoe.attacks.evaluation.evaluate import evaluate
from ironmoe.attacks.evaluation.expected import ExpectedAccuracy
from ironmoe.attacks.evaluation.findings.accuracy import Accuracy, AccuracyRange, UndecidedError
from ironmoe.attacks.evaluation.findings.flag import Flag
from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.attacks.evaluation.journal_file import JournalError
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.proportion import Proportion
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.goals.class_sets import ClassSet, Superclass
from ironmoe.attacks.goals.confident import Confident
from ironmoe.attacks.goals.custom import Custom
from ironmoe.attacks.goals.embedding import EmbeddingDistance
from ironmoe.attacks.goals.goal import Goal
from ironmoe.attacks.goals.labels import Targeted, Untargeted
from ironmoe.attacks.goals.multi_label import MultiLabel
from ironmoe.attacks.goals.regression import Regression
from ironmoe.attacks.goals.segmentation import Segmentation
from ironmoe.attacks.goals.top_k import TopK
from ironmoe.attacks.methods.apgd import APGD
from ironmoe.attacks.methods.carlini_wagner import CW
from ironmoe.attacks.methods.deepfool import DeepFool
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.fgsm import FGSM
from ironmoe.attacks.methods.hopskipjump import HopSkipJump
from ironmoe.attacks.methods.mifgsm import MIFGSM
from ironmoe.attacks.methods.pgd import PGD
from ironmoe.attacks.methods.square import Square
from ironmoe.attacks.methods.vmoe_pgd import VMoEPGD
from ironmoe.attacks.registry import register_attack
from ironmoe.attacks.result import AttackResult
from ironmoe.attacks.results.accuracies import accuracies, csv_table
from ironmoe.attacks.results.comparison import ComparedAccuracy, Comparison, compare
from ironmoe.attacks.results.image_rows import per_image, read_rows, write_rows
from ironmoe.attacks.results.latex import latex_table
from ironmoe.attacks.results.paired import PairedDifference, paired_difference
from ironmoe.attacks.robustbench.benchmark import robustbench_evaluate
from ironmoe.attacks.routing.batch_mates import BatchMates
from ironmoe.attacks.routing.mates_search import BatchMatesResult
from ironmoe.attacks.routing.modes import (
    AuxiliaryLoss,
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingDivergence,
    Softened,
    StraightThrough,
)
from ironmoe.attacks.routing.statistics import AttackStatistics, attack_statistics
from ironmoe.attacks.universal.perturbation import UniversalPerturbation
from ironmoe.attacks.universal.result import UniversalReport, UniversalResult

__all__ = [
    "APGD",
    "CW",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Accuracy",
    "AccuracyRange",
    "Attack",
    "AttackCurve",
    "AttackResult",
    "AttackStatistics",
    "AttackSummary",
    "AutoAttack",
    "AuxiliaryLoss",
    "Ball",
    "BatchMates",
    "BatchMatesResult",
    "Certificate",
    "CertificationReport",
    "ClassSet",
    "ComparedAccuracy",
    "Comparison",
    "Confident",
    "Custom",
    "DeepFool",
    "EmbeddingDistance",
    "Ensemble",
    "ExpectedAccuracy",
    "ExpertsOnly",
    "FixedRadiusAttack",
    "Flag",
    "FrozenRouting",
    "GatesOnly",
    "Goal",
    "HopSkipJump",
    "JournalError",
    "LeastDistanceAttack",
    "MultiLabel",
    "PairedDifference",
    "Progress",
    "Proportion",
    "Regression",
    "RobustnessReport",
    "RoutingDivergence",
    "RoutingMode",
    "Segmentation",
    "Smoothed",
    "Softened",
    "Square",
    "StraightThrough",
    "Superclass",
    "Targeted",
    "TopK",
    "UndecidedError",
    "UniversalPerturbation",
    "UniversalReport",
    "UniversalResult",
    "Untargeted",
    "VMoEPGD",
    "accuracies",
    "attack_curve",
    "attack_statistics",
    "certified_and_attacked",
    "certify",
    "check_model",
    "check_outcome",
    "compare",
    "csv_table",
    "evaluate",
    "latex_table",
    "paired_difference",
    "per_image",
    "read_rows",
    "register_attack",
    "register_norm",
    "robustbench_evaluate",
    "write_rows",
]
