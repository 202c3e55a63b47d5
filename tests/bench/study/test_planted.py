"""Ladders that are made to differ, measured as a study measures them: each gets the verdict that
was planted in it.

A model is a linear classifier on the pixels of an image with one MoE layer beside it, whose experts
are linear, too. What the layer adds is chosen, and so is what its router follows: in a direction in
which images do not differ, clean accuracy stays and attacks gain.
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

PIXELS, CLASSES, SEEDS = 16, 4, 4
FAR = 10.0  # in it gelu is linear
BUDGET = Budget(
    radii=(16.0, 32.0), radius=32.0, clean_images=60, images=60, routed_images=30, steps=5,
    local_images=30, swap_images=30, paper_images=30, least_steps=8, least_targets=1,
)  # fmt: skip


class Planted(nn.Module):
    """logits = W (x − ½) + V y, y the output of the MoE layer."""

    def __init__(self, seed, experts, top_k, *, renormalize=False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        directions, _ = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=generator))
        self.templates = nn.Parameter(directions[:, :CLASSES].T)
        self.quiet = directions[:, CLASSES:].T  # images are alike in these
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


def images_of(seed, of_group=0.0):
    """Images whose class is the direction in which they are brighter; a few lie near another.
    of_group: how much brighter they are in one of four directions that have no part in the class.
    """
    model = Planted(seed, 2, 2)
    generator = torch.Generator().manual_seed(100)
    labels, groups = torch.arange(60) % CLASSES, torch.arange(60) // CLASSES % 4
    lengths = 0.2 + 0.5 * torch.rand(60, 1, generator=generator)
    bright = lengths * model.templates.detach()[labels] + of_group * model.quiet[groups]
    return (0.5 + bright).clamp(0, 1).view(-1, 1, 4, 4), labels


def measured(name, plant, what, *, of_group=0.0, budget=BUDGET, seeds=SEEDS):
    """Rows of so many models of an arm, as a study has them."""
    arm, rows = LADDER[name], []
    # the dense model is a layer whose two experts are always on
    experts, top_k = (2, 2) if arm.is_dense else (arm.experts, arm.top_k)
    for seed in range(seeds):
        model = Planted(seed, experts, top_k, renormalize=arm.renormalize)
        plant(model)

        subject, found = Subject(model, *images_of(seed, of_group)), Outcome()
        for each in what:
            found += all_measurements()[each].measure(subject, budget)
        rows.append(Measured(name, "standard", seed, found.values, found.images))
    return rows


def verdict(claim, rows, arms):
    found = verdicts(rows, [LADDER[name] for name in arms])
    return next(each for each in found if each.claim == claim)


def leaky(size):
    """Equal experts, whose slope in a direction in which images are alike favours one class."""

    def plant(model):
        maps = torch.zeros(model.layer.num_experts, PIXELS, PIXELS)
        maps[:, 0] = size * model.quiet[0]
        model.set_experts(maps)

    return plant


@functools.cache
def of_leak(name, size, beside):
    """An arm whose experts leak; beside: what is measured of it beside its robustness."""
    return measured(name, leaky(size), ("clean", "curve", beside))


@pytest.mark.parametrize(
    ("dense", "experts", "answer", "because"),
    [
        (3.0, 0.0, "supported", "effect"),
        (0.0, 10.0, "against", "opposite"),
        (0.0, 0.0, "against", "no difference"),
    ],
)
@pytest.mark.parametrize("claim", ["equal cost", "smoothness"])
def test_a_leak_in_one_of_two_models_is_found(dense, experts, answer, because, claim):
    rows = of_leak(DENSE, dense, "derivative") + of_leak("E8", experts, "derivative")
    found = verdict(claim, rows, (DENSE, "E8"))
    assert (found.verdict, found.because) == (answer, because), found.words


def ladder(of_2, of_8, of_32):
    """Leaks of so many experts, with both kinds of gates."""
    sizes = {"E2": of_2, "E8": of_8, "E32": of_32, "E8-renorm": of_8, "E32-renorm": of_32}
    rows = [row for name, size in sizes.items() for row in of_leak(name, size, "expert use")]
    return verdict("more experts", rows, sizes)


def test_what_the_scale_of_gates_does_is_not_taken_for_experts():
    """All experts leak alike. With source gates the more experts there are, the less they weigh."""
    found = ladder(3.0, 3.0, 3.0)
    source, renormalized = found.effects[:2]
    assert source.low > 2 and renormalized.mean == pytest.approx(0, abs=1e-6)
    assert (found.verdict, found.because) == ("against", "no difference"), found.words
    assert "no difference of more than 2 points with gates that sum to 1" in found.words
    assert "Only the gates of the source show a rise" in found.words
    assert "which sum to 1.00 with 2 experts and to" in found.words


@pytest.mark.parametrize(
    ("sizes", "answer", "because"),
    [((3.0, 1.5, 0.0), "supported", "effect"), ((0.0, 1.5, 3.0), "against", "opposite")],
)
def test_a_leak_that_shrinks_with_the_number_of_experts_is_found(sizes, answer, because):
    """Gates that sum to 1 cannot explain it, so it is the experts."""
    found = ladder(*sizes)
    assert (found.verdict, found.because) == (answer, because), found.words
    assert "Only the gates of the source" not in found.words


def votes(size, *, apart=True, leak=0.0):
    """Two experts a class: the router sends images of the class to them, and they vote for it, or
    all for one. leak: how much more than the class the router follows a direction that is of no
    class; each class has its own."""

    def plant(model):
        of_expert = torch.arange(8) % CLASSES
        followed = model.templates + leak * model.quiet[:CLASSES]
        with torch.no_grad():
            model.layer.router.weight.copy_(8 * followed[of_expert])
            model.layer.fc2.bias.zero_()
            model.layer.fc2.bias[torch.arange(8), of_expert if apart else 0] = size

    return plant


@pytest.mark.parametrize(
    ("plant", "answer", "because"),
    [
        (votes(0.1, apart=False), "supported", "equivalence"),
        (votes(3.0), "against", "change"),
    ],
    ids=["equal", "apart"],
)
def test_experts_that_are_equal_or_far_apart_are_told(plant, answer, because):
    rows = measured("E8", plant, ("clean", "interventions"))
    assert all(row.values["clean"] > 0.9 for row in rows)
    found = verdict("choice of experts", rows, ("E8",))
    assert (found.verdict, found.because) == (answer, because), found.words


NARROW = BUDGET._replace(radii=(8.0, 16.0), radius=16.0)  # where most images keep their class
ROUTERS = {
    "leaky": votes(3.0, leak=3.0),
    "follows the class": votes(3.0),
    "leaky, experts are equal": votes(0.0, leak=3.0),
}


@functools.cache
def of_router(router):
    """All that a study measures of routing, at 16/255."""
    what = ("clean", "curve", "derivative", "paper", "routed attacks", "swaps")
    return measured("E8", ROUTERS[router], what, budget=NARROW, seeds=3)


def signs_of_a_leaky_router(values):
    """What a study would tell it by. The attack moves the routing and noise does not; a search that
    does not see routing misses, and one that sees gates alone finds; the clean routing restores
    attacked images, and theirs breaks clean ones; a swap is near, and it jumps."""
    moved, by_noise = (values[f"{name}@16:intended"] for name in ("routing", "routing noise"))
    free, frozen, gates, replayed, rerouted = (
        values[f"{mode}@16"] for mode in ("free", "frozen", "gates", "replayed", "rerouted")
    )
    signs = {
        "moved": moved - by_noise > 0.5,
        "frozen": frozen - free > 0.4,
        "gates": gates < 0.2,
        "replayed": replayed - free > 0.4,
        "rerouted": rerouted < 0.2,
        "near": values["swap"] < 12,
        "jump": values["jump"] > 0.5,
    }
    return {sign for sign, is_there in signs.items() if is_there}


@pytest.mark.parametrize(
    ("router", "signs"),
    [
        ("leaky", {"moved", "frozen", "gates", "replayed", "rerouted", "near", "jump"}),
        ("follows the class", {"jump"}),  # it swaps where the class changes
        ("leaky, experts are equal", {"near"}),  # nothing is gained by a swap
    ],
)
def test_a_leaky_router_shows_in_all_measurements_of_routing(router, signs):
    for row in of_router(router):
        assert row.values["clean"] == 1
        assert signs_of_a_leaky_router(row.values) == signs, row.values


@functools.cache
def linear():
    """The classifier without what the layer adds."""
    return measured(DENSE, leaky(0.0), ("clean", "curve", "derivative"), budget=NARROW, seeds=3)


@pytest.mark.parametrize(
    ("router", "because"),
    [
        ("leaky", "opposite"),
        ("follows the class", "no difference"),
        ("leaky, experts are equal", "no difference"),
    ],
)
def test_a_leaky_router_costs_robustness_at_equal_cost(router, because):
    found = verdict("equal cost", linear() + of_router(router), (DENSE, "E8"))
    assert (found.verdict, found.because) == ("against", because), found.words


def test_a_first_order_radius_does_not_see_where_a_router_swaps():
    """Votes for its class add to the margin of an image, and its tangent does not know that a swap
    takes them away: it promises twice the radius at which no image keeps its class."""
    for row in of_router("leaky"):
        assert row.values["pgd@16"] == 0 and row.values["r1"] > 2 * 16

    found = verdict("smoothness", linear() + of_router("leaky"), (DENSE, "E8"))
    assert found.verdict == "supported", found.words


def pairs(opposed, unseen):
    """Four pairs of experts, one for each group of images. The two of a pair vote against each
    other, which cancels until an attack moves their gates; in outputs that the classifier does not
    read they may differ, too."""

    def plant(model):
        of_pair, sign = torch.arange(8) // 2, torch.tensor([1.0, -1.0]).repeat(4)
        with torch.no_grad():
            of_group = 20 * model.quiet[of_pair]
            model.layer.router.weight.copy_(of_group + 10 * sign[:, None] * model.quiet[4])
            bias = model.layer.fc2.bias.zero_()
            bias[:, 0] = sign * torch.tensor(opposed)[of_pair]
            bias[:, -2] = sign * torch.tensor(unseen)[of_pair]
            bias[:, -1] = 1.0  # what distances are relative to

    return plant


def of_pairs(opposed, unseen=(0.0, 0.0, 0.0, 0.0), **kwargs):
    what = ("clean", "top experts", "least radius")
    rows = measured("E8", pairs(opposed, unseen), what, of_group=0.25, **kwargs)
    assert all(row.values["clean"] == 1 for row in rows)
    return verdict("different experts", rows, ("E8",))


@pytest.mark.parametrize(
    ("opposed", "unseen", "answer", "because"),
    [
        ((0.0, 0.3, 0.6, 1.0), (0.0, 0.0, 0.0, 0.0), "supported", "effect"),
        ((1.0, 0.6, 0.3, 0.0), (0.0, 1.0, 2.0, 4.0), "against", "opposite"),
        ((0.5, 0.5, 0.5, 0.5), (0.0, 1.0, 2.0, 4.0), "undecided", "contains 0"),
    ],
    ids=["harmful", "harmless", "beside"],
)
def test_top_experts_that_differ_are_blamed_where_they_do_harm(opposed, unseen, answer, because):
    """At equal margin: before the attack no pair adds anything to the logits."""
    found = of_pairs(opposed, unseen)
    assert (found.verdict, found.because) == (answer, because), found.words


def test_experts_that_are_all_equal_leave_no_distance_to_judge_by():
    found = of_pairs((0.5, 0.5, 0.5, 0.5), seeds=3)
    assert (
        found.verdict == "not measured" and "it takes 20 that the model gets right" in found.words
    )
