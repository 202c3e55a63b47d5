"""Adversarial training: losses that make their adversarial images themselves, for any loop.

Read in this order:

1. ``inner/``: the attack on the model that trains, a plain loop; ``attacks`` has it as functions.
2. ``method``: what every method shares; ``registry``: their names.
3. ``methods/``: one method in each file, ``pgd_at`` first.
4. ``weights/``: perturbed and averaged weights; ``guards/``: what a training must not run into.

docs/training.md says which method to take.
"""

from ironmoe.attacks.training.guards.collapse import (
    CollapseAlarm,
    NonFiniteRouter,
    RouterCollapseWarning,
    RouterLoad,
)
from ironmoe.attacks.training.guards.non_finite import NonFiniteLoss, first_non_finite_layer
from ironmoe.attacks.training.guards.overfitting import OverfittingGuard, OverfittingVerdict
from ironmoe.attacks.training.inner.attacks import fgsm_rs, kl_pgd, n_fgsm, pgd, vmoe_pgd
from ironmoe.attacks.training.inner.loop import Inner
from ironmoe.attacks.training.method import Strength, TrainingMethod, Update
from ironmoe.attacks.training.methods.alternating import Alternating
from ironmoe.attacks.training.methods.fgsm_rs import FGSMRS
from ironmoe.attacks.training.methods.free import Free
from ironmoe.attacks.training.methods.mart import MART
from ironmoe.attacks.training.methods.n_fgsm import NFGSM
from ironmoe.attacks.training.methods.pgd_at import PGDAT
from ironmoe.attacks.training.methods.routing_consistency import RoutingConsistency
from ironmoe.attacks.training.methods.second_ranked import SecondRanked
from ironmoe.attacks.training.methods.standard import Standard
from ironmoe.attacks.training.methods.trades import TRADES
from ironmoe.attacks.training.mixup import Mixup
from ironmoe.attacks.training.registry import (
    TRAINING_METHODS,
    RegisteredMethod,
    register_training_method,
    training_method,
)
from ironmoe.attacks.training.weights.awp import AWP
from ironmoe.attacks.training.weights.ema import EMA
from ironmoe.attacks.training.weights.end_of_backward import EndOfBackward

__all__ = [
    "AWP",
    "EMA",
    "FGSMRS",
    "MART",
    "NFGSM",
    "PGDAT",
    "TRADES",
    "TRAINING_METHODS",
    "Alternating",
    "CollapseAlarm",
    "EndOfBackward",
    "Free",
    "Inner",
    "Mixup",
    "NonFiniteLoss",
    "NonFiniteRouter",
    "OverfittingGuard",
    "OverfittingVerdict",
    "RegisteredMethod",
    "RouterCollapseWarning",
    "RouterLoad",
    "RoutingConsistency",
    "SecondRanked",
    "Standard",
    "Strength",
    "TrainingMethod",
    "Update",
    "fgsm_rs",
    "first_non_finite_layer",
    "kl_pgd",
    "n_fgsm",
    "pgd",
    "register_training_method",
    "training_method",
    "vmoe_pgd",
]
