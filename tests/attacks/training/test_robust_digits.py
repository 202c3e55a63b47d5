"""Each method makes models more robust than standard training does: over four paired seeds, on
digits that were not trained on."""

from functools import cache

import pytest
import torch
from torch import nn
from training_toys import digits

from ironmoe.attacks import APGD, PGD, evaluate
from ironmoe.attacks.training import AWP, EMA, PGDAT, TRAINING_METHODS, Standard
from ironmoe.moe import MoE

RADIUS, SEEDS, UPDATES = 0.15, range(4), 24
CASES = [  # dense models, which take less time, where a method does not need experts
    ("pgd-at, awp", False),
    ("pgd-at, ema", False),
    *(
        (name, entry.needs_experts)
        for name, entry in TRAINING_METHODS.items()
        if entry.kind is not Standard
    ),
]


@cache
def data():
    """400 images to train on with their labels, and 100 others."""
    return digits(400, 100)


def new_model(with_experts, seed):
    torch.manual_seed(seed)
    hidden = MoE(32, 32, 2, 1) if with_experts else nn.Linear(32, 64)
    width = 32 if with_experts else 64
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    return nn.Sequential(first, hidden, nn.ReLU(), nn.Linear(width, 10))


def trained(make, with_experts, seed, ema=False):
    """A model after so many updates as every other."""
    model = new_model(with_experts, seed)
    (images, labels), _ = data()
    method = make(model)
    optimizers = {g: torch.optim.Adam(method.parameters_of(g), lr=1e-2) for g in method.groups}
    average = EMA(model, 0.9)
    for _ in range(UPDATES // 2):
        for rows in torch.randperm(400).split(200):
            for update in method.updates(images[rows], labels[rows]):
                model.zero_grad()
                update.loss.backward()
                optimizers[update.group].step()
                average.update()
    if ema:
        average.copy_to(model)
    return model.eval()


def accuracies(model):
    """Clean, under PGD-20 and under APGD-T, in [0, 1]."""
    attacks = {
        "pgd": PGD(model, eps=RADIUS, steps=20),
        "apgd-t": APGD(model, eps=RADIUS, steps=5, loss="dlr", targets=2),
    }
    report = evaluate(model, data()[1], attacks, checks=False)
    robust = [report.attacks[name].robust_accuracy.value for name in attacks]
    return torch.tensor([report.clean_accuracy.value, *robust])


@cache
def of_standard(with_experts, seed):
    return accuracies(trained(Standard, with_experts, seed))


MAKERS = {
    "pgd-at, awp": lambda model: AWP(
        PGDAT(model, RADIUS, steps=2, ramp_steps=UPDATES // 2), warmup_steps=UPDATES // 2
    ),
    "pgd-at, ema": lambda model: PGDAT(model, RADIUS, steps=2, ramp_steps=UPDATES // 2),
}


def maker(name):
    """Makes the method of a case for a model."""
    if name in MAKERS:
        return MAKERS[name]
    entry = TRAINING_METHODS[name]
    options = {} if entry.single_step else {"steps": 2}
    return lambda model: entry.kind(model, RADIUS, ramp_steps=UPDATES // 2, **options)


@pytest.mark.parametrize(("name", "with_experts"), CASES)
def test_a_method_makes_models_more_robust_than_standard_training(name, with_experts):
    """Of the same seed: the weights that both begin with, and their batches."""
    gains = torch.stack(
        [
            accuracies(trained(maker(name), with_experts, seed, ema="ema" in name))
            - of_standard(with_experts, seed)
            for seed in SEEDS
        ]
    )
    clean, pgd, apgd = gains.mean(0).tolist()
    assert pgd > 0.1 and apgd > 0.1, gains
    assert gains[:, 1:].min() > 0 and clean > -0.15, gains
