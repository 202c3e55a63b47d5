"""The evaluations whose journals lie in tests/data/journal_v1, written before journals had a format
number. It uses public names alone, so that old and new code run it alike."""

import functools
from pathlib import Path

import numpy
import torch
from torch import nn

from ironmoe.attacks import (
    APGD,
    CW,
    FAB,
    FGSM,
    MIFGSM,
    PGD,
    Attack,
    AutoAttack,
    AuxiliaryLoss,
    DeepFool,
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingDivergence,
    Softened,
    Square,
    StraightThrough,
    evaluate,
)

DATA = Path(__file__).parents[1] / "data" / "journal_v1"
SCENARIOS = ("complete", "cut", "routing", "least_distance", "options", "l1")


class Stored(nn.Module):
    """The model of the checkpoint, in float64; what it prints does not depend on torch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)

    def __repr__(self):
        return "Stored()"


class Halfway(Attack):
    """A user's attack: half of a step at a time."""

    max_queries = 2
    queries = 2  # the name of the same number in the old code

    def __init__(self, model, eps, share=0.5):
        super().__init__(model, eps)
        self.share = share

    def start(self, attempts):
        attempts["point"] = attempts["clean"]

    def loss(self, logits, attempts):
        return nn.functional.cross_entropy(logits, attempts["label"], reduction="none")

    def advance(self, attempts, logits, loss, grad):
        ball = self.ball(attempts)
        attempts["point"] = ball.step(attempts["point"], grad, self.share * attempts["eps"])
        attempts["finished"] = attempts["finished"] | (attempts["queries"] >= 2)


class Decaying(MIFGSM):
    """A user's relative of an attack of the library."""

    def __init__(self, model, eps, steps, twist=3):
        super().__init__(model, eps, steps=steps, decay=0.5)
        self.twist = twist


def scaled_loss(logits, labels, scale=1.0):
    return scale * nn.functional.cross_entropy(logits, labels, reduction="none")


def data():
    """Images (6, 1, 8, 8) float64 in units of 1/255, labels (6,)."""
    stored = numpy.load(DATA / "images.npz")
    return torch.tensor(stored["images"]).double() / 255, torch.tensor(stored["labels"])


def arguments(scenario, model):
    """Keyword arguments of ``evaluate``, without the journal."""
    half = functools.partial(scaled_loss, scale=0.5)
    attacks, options = {
        "complete": lambda: (
            {
                "fgsm": FGSM(model),
                "pgd": PGD(model, steps=4, restarts=2, seed=3),
                "apgd-t": APGD(model, steps=4, targets=2),
                "square": Square(model, steps=6, p_init=0.5),
            },
            {"eps": [0.02, 0.1], "keep_adversarial": True, "batch_size": 4},
        ),
        "cut": lambda: (
            {
                "auto": AutoAttack(
                    model, eps=0.1, version="custom", attacks_to_run=["apgd-ce", "fab-t"]
                ),
                "fab": FAB(model, 0.1, steps=5, targets=2),
                "square": Square(model, 0.1, steps=20, seed=1),
            },
            {"batch_size": 2},
        ),
        "routing": lambda: (
            {
                "frozen": PGD(model, 0.1, steps=3, routing=FrozenRouting()),
                "diverted": MIFGSM(model, 0.1, steps=3, routing=RoutingDivergence(0.5, "weakest")),
                "softened": APGD(model, 0.1, steps=3, routing=Softened(2.0)),
                "straight": PGD(model, 0.1, steps=2, routing=StraightThrough()),
                "gates": PGD(model, 0.1, steps=2, routing=GatesOnly()),
                "experts": FGSM(model, 0.1, routing=ExpertsOnly()),
                "auxiliary": PGD(model, 0.1, steps=2, routing=AuxiliaryLoss(0.0)),
                "vmoe": PGD.vmoe(model, 0.1, steps=2, bounds=(0.0, 1.0)),
            },
            {"batch_size": 3},
        ),
        "least_distance": lambda: (
            {
                "cw": CW(model, c=1.0, steps=4, search_steps=2),
                "deepfool": DeepFool(model, steps=4),
                "fab": FAB(model, 1.0, steps=3, targets=0, norm="L2", early_stop=False),
            },
            {"keep_adversarial": True},
        ),
        "options": lambda: (
            {
                "mean": PGD(model, 0.1, steps=2, eot=2, normalize=((0.5,), (0.5,))),
                "bfloat16": APGD(model, 0.1, steps=2, loss="dlr", attack_dtype=torch.bfloat16),
                "partial": PGD(model, 0.1, 0.03, 2, False, loss=half, logits_fn=torch.clone),
                "targeted": PGD(model, 0.1, steps=2, targeted=True, early_stop=False),
                "last": PGD.torchattacks(model, 0.1, steps=2, random_start=False),
                "halfway": Halfway(model, 0.1),
                "decaying": Decaying(model, 0.1, 2),
            },
            {},
        ),
        "l1": lambda: (
            {
                "apgd": APGD(model, 1.0, steps=4, norm="L1", three_radii=True, targets=1),
                "auto": AutoAttack(model, "L1", 1.0, "custom", attacks_to_run=["apgd-ce"]),
                "plus": AutoAttack(model, "L2", 0.3, "plus"),
            },
            {"max_forwards": 200},
        ),
    }[scenario]()
    return {"attacks": attacks, "checks": False} | options


def run(scenario, model, folder, **options):
    return evaluate(model, data(), journal=folder, **(arguments(scenario, model) | options))
