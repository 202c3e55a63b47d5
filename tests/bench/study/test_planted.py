"""Ladders that are made to differ, measured as a study measures them: each gets the verdict that
was planted in it.

A model is a linear classifier on the pixels of an image with one MoE layer beside it, whose experts
are linear, too. What the layer adds is chosen: the size of its slope in a direction in which images
do not differ, so that clean accuracy stays and attacks gain.
"""

import functools

import pytest
import torch
from torch import nn

from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.ladder.arms import DENSE, LADDER
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.bench.study.statistics.measured import Measured
from ironmoe.moe import MoE, TopKRouter

PIXELS, CLASSES, SEEDS = 16, 3, 6
FAR = 10.0  # in it gelu is linear
BUDGET = Budget(
    radii=(16.0, 32.0), radius=32.0, clean_images=60, images=60, routed_images=30, steps=5,
    local_images=30,
)  # fmt: skip


class Planted(nn.Module):
    """logits = W (x − ½) + V y, y the output of the MoE layer."""

    def __init__(self, seed, experts, top_k, *, renormalize=False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        directions, _ = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=generator))
        self.templates = nn.Parameter(directions[:, :CLASSES].T)
        self.leak = directions[:, CLASSES]  # images are alike in it
        self.layer = MoE(
            PIXELS,
            PIXELS,
            experts,
            top_k,
            router=TopKRouter(PIXELS, experts, top_k, renormalize=renormalize),
        )
        with torch.no_grad():
            self.layer.router.weight.copy_(torch.randn(experts, PIXELS, generator=generator))
            self.set_experts(torch.zeros(experts, PIXELS, PIXELS))
        self.out = nn.Linear(PIXELS, CLASSES, bias=False)
        nn.init.eye_(self.out.weight)

    @torch.no_grad()
    def set_experts(self, maps):
        """maps (E, D, D): expert e gives maps[e] (x − ½)."""
        experts = len(maps)
        self.layer.fc1.weight.copy_(torch.eye(PIXELS).expand(experts, -1, -1))
        self.layer.fc1.bias.fill_(FAR)
        self.layer.fc2.weight.copy_(maps)
        self.layer.fc2.bias.copy_(-FAR * maps.sum(2))

    def forward(self, images):
        x = images.flatten(1) - 0.5
        return x @ self.templates.T + self.out(self.layer(x))


def images_of(seed):
    """Images whose class is the direction in which they are brighter; a few lie near another."""
    directions = Planted(seed, 2, 2).templates.detach()
    generator = torch.Generator().manual_seed(100)
    labels = torch.arange(60) % CLASSES
    lengths = 0.2 + 0.5 * torch.rand(60, 1, generator=generator)
    images = (0.5 + lengths * directions[labels]).clamp(0, 1)
    return images.view(-1, 1, 4, 4), labels


def leaky(size):
    """Equal experts, whose slope in the direction of the leak favours one class."""

    def plant(model):
        maps = torch.zeros(model.layer.num_experts, PIXELS, PIXELS)
        maps[:, 0] = size * model.leak
        model.set_experts(maps)

    return plant


def measured(arms, plants, names):
    """Rows of SEEDS models of each arm, as a study has them."""
    rows = []
    for seed in range(SEEDS):
        images, labels = images_of(seed)
        for name, plant in zip(arms, plants, strict=True):
            arm = LADDER[name]
            # the dense model is a layer whose two experts are always on
            experts, top_k = (2, 2) if arm.is_dense else (arm.experts, arm.top_k)
            model = Planted(seed, experts, top_k, renormalize=arm.renormalize)
            plant(model)
            subject = Subject(model, images, labels)
            found = Outcome()
            for what in names:
                found += all_measurements()[what].measure(subject, BUDGET)
            rows.append(Measured(name, "standard", seed, found.values, found.images))
    return rows


def verdict(claim, rows, arms):
    found = verdicts(rows, [LADDER[name] for name in arms])
    return next(each for each in found if each.claim == claim)


@functools.cache
def leaky_and_tight():
    """A dense model with a leak, one with experts without, and the other way round."""
    names = ("clean", "curve", "derivative")
    tight, open_ = leaky(0.0), leaky(3.0)
    return {
        "tight experts": measured((DENSE, "E8"), (open_, tight), names),
        "leaky experts": measured((DENSE, "E8"), (tight, leaky(3.0 / 0.3)), names),
        "equal": measured((DENSE, "E8"), (tight, tight), names),
    }


@pytest.mark.parametrize(
    ("planted", "answer"),
    [("tight experts", "supported"), ("leaky experts", "against"), ("equal", "against")],
)
@pytest.mark.parametrize("claim", ["equal cost", "smoothness"])
def test_a_leak_in_one_of_two_models_is_found(planted, answer, claim):
    found = verdict(claim, leaky_and_tight()[planted], (DENSE, "E8"))
    assert found.verdict == answer, found.words
    assert (found.because == "no difference") == (planted == "equal"), found.words


def test_what_the_scale_of_gates_does_is_not_taken_for_experts():
    """All experts leak alike. With source gates the more experts there are, the less they weigh."""
    source, renormalized = ("E2", "E8", "E32"), ("E8-renorm", "E32-renorm")
    arms = (DENSE, *source, *renormalized)
    rows = measured(arms, [leaky(3.0)] * len(arms), ("clean", "curve", "expert use"))
    found = verdict("more experts", rows, arms)
    assert found.verdict != "supported" and "gates" in found.words, found.words
    trend = {effect.label: effect.mean for effect in found.effects if effect.role != "exploratory"}
    assert max(trend.values()) > 2, trend  # points: with source gates the ladder rises


def votes(apart):
    """The router sends an image to experts of its class; each of them votes for that class, or all
    vote for one."""

    def plant(model):
        of_expert = torch.arange(8) % CLASSES
        with torch.no_grad():
            model.layer.router.weight.copy_(20 * model.templates[of_expert])
            model.layer.fc2.bias.zero_()
            model.layer.fc2.bias[torch.arange(8), of_expert if apart else 0] = 3.0 if apart else 0.1

    return plant


@pytest.mark.parametrize(("apart", "answer"), [(False, "supported"), (True, "against")])
def test_experts_that_are_equal_or_far_apart_are_told(apart, answer):
    rows = measured(("E8",), (votes(apart),), ("clean", "interventions"))
    assert all(row.values["clean"] > 0.9 for row in rows)
    found = verdict("choice of experts", rows, ("E8",))
    assert found.verdict == answer, found.words
