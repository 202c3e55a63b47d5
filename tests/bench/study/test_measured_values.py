"""What the study measures around images: of a linear model by its formula, of a mixture of experts
against the library."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from ironmoe.attacks import APGD, FAB, evaluate
from ironmoe.attacks.certificates import certify
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.smoothness import (
    jacobian_matrix,
    layer_terms,
    local_linearity,
    nearest_swaps,
    slope_profile,
    stability,
    swap_jumps,
)
from ironmoe.bench.study.measure import paper_attack
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.interventions import policies
from ironmoe.bench.study.measure.steered import steered
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.moe import VMoE, trace_routing
from ironmoe.moe.policies import (
    AllExperts,
    DropBest,
    DropRank,
    Lowest,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    RenormalizedGates,
    SameSum,
    UniformGates,
    UseRanks,
)

BUDGET = Budget(
    radii=(2.0, 8.0, 32.0), radius=16.0, clean_images=4, images=4, targeted_images=4,
    paper_images=4, local_images=4, swap_images=3, steps=3, apgd_steps=3, targets=3,
    slope_steps=2, least_steps=5, least_targets=3, certified_images=6, samples=100, sigma=0.5,
    batch_size=3,
)  # fmt: skip

AWAY = (4.0, 20.0, 100.0, -40.0)  # the images of the linear model, as ``linear`` takes them
ROOT = math.sqrt(2)
LINEAR = {
    "clean": (
        {"clean": 3 / 4, "clean loss": sum(math.log1p(math.exp(-16 / 255 * r)) for r in AWAY) / 4},
        {"clean": [1, 1, 1, 0], "margin": [16 / 255 * r for r in AWAY]},
    ),
    "curve": (
        {
            "pgd@2": 3 / 4,
            "pgd@8": 2 / 4,
            "pgd@32": 1 / 4,
            "auc": (6 * (3 + 2) / 8 + 24 * (2 + 1) / 8) / 30,
        },
        {
            "pgd@2": [1, 1, 1, 0],
            "pgd@8": [0, 1, 1, 0],
            "pgd@32": [0, 0, 1, 0],
            "auc": [6 * 1 / 2 / 30, (6 + 24 * 1 / 2) / 30, 1, 0],
        },
    ),
    "derivative": (
        {"r1": (4 + 20 + 100 + 0) / 4, "jacobian": ROOT},
        {"r1": [4, 20, 100, math.nan], "jacobian": [ROOT] * 4},
    ),
    "least radius": (
        {"least_eps": (4 + 20 + 100 + 0) / 4, "least_eps:unsolved": 0},
        {"least_eps": [4, 20, 100, math.nan]},
    ),
    "slopes": ({f"slope@{radius}:free": 8 * ROOT for radius in (0.25, 1, 4, 16)}, {}),
    "apgd": ({"apgd-ce@16": 2 / 4}, {"apgd-ce@16": [0, 1, 1, 0]}),  # two classes: no targets
    "paper": (
        {f"vmoe@{radius}": held / 4 for radius, held in ((2, 3), (8, 2), (32, 1))}
        | {f"vmoe-clipped@{radius}": held / 4 for radius, held in ((2, 3), (8, 2), (32, 1))}
        | {f"vmoe@{radius}:changed": lost / 4 for radius, lost in ((2, 0), (8, 1), (32, 2))},
        {},
    ),
}
"""Name → numbers of the linear model, and of each image."""


def linear(*away):
    """A linear model of two classes, and images that are so far away from the other class, in units
    of 1/255 in Linf. All have the label 0; of one with a negative distance it is wrong.

    A margin is 16 times the distance in pixels, ‖J‖₂ is √2, and a step of length 1 in Linf changes
    the logits by 8 √2 at most."""
    signs = torch.tensor([1.0, -1.0] * 32)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    made[1].weight.data = torch.stack([signs, -signs]) / 8
    made[1].bias.data.zero_()
    images = 0.5 + torch.tensor(away)[:, None] / 255 * signs
    labels = torch.zeros(len(away), dtype=torch.int64)
    return Subject(made, images.view(-1, 1, 8, 8), labels)


@pytest.fixture(scope="module")
def moe():
    """Four experts, of which a token takes two. The first and the sixth image are wrong."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16}
    made = VMoE(**sizes, num_classes=5, channels=1, moe_layers=(0, 1), num_experts=4, top_k=2)
    nn.init.normal_(made.head.weight, std=0.5)
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = made.eval()(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    return Subject(made, images, labels)


def outcome(name, of, **settings):
    return all_measurements()[name].measure(of, BUDGET._replace(**settings))


def close(expected, rel=1e-4):
    return pytest.approx(expected, rel=rel, abs=1e-6, nan_ok=True)


def mean(rows):
    return float(rows.double().mean())


@pytest.mark.parametrize("name", LINEAR)
def test_numbers_of_a_linear_model_follow_from_its_weights(name, monkeypatch):
    monkeypatch.setattr(paper_attack, "STEPS", 3)
    found = outcome(name, linear(*AWAY))
    values, images = LINEAR[name]
    assert found.values == close(values, rel=1e-3)  # a search comes near
    assert set(found.images) == set(images)
    for key, row in images.items():
        assert found.images[key] == close(row, rel=1e-3), key


@pytest.mark.parametrize("slope", [0.0, 1e-3])
def test_no_first_order_radius_is_longer_than_an_image_can_go(slope):
    """Its logits are all but constant, so their tangent meets another class far outside."""
    made = linear(20.0, -20.0)
    made.model[1].weight.data *= slope
    made.model[1].bias.data = torch.tensor([1.0, 0.0])
    farthest = 0.5 * 255 + 20
    assert outcome("derivative", made).images["r1"] == close([farthest, farthest])


def test_the_mean_height_of_a_curve_at_one_radius_is_its_height():
    values = outcome("curve", linear(*AWAY), radii=(8.0,)).values
    assert values == {"pgd@8": 2 / 4, "auc": 2 / 4}


def test_an_image_without_another_class_counts_as_far_as_the_bounds_allow():
    made = linear(*AWAY)
    made.model[1].bias.data[0] = 1000
    made.labels[0] = 1
    found = outcome("least radius", made)
    far = [255 / 2 + away for away in (20, 100, 40)]
    assert found.values == close({"least_eps": sum(far) / 4, "least_eps:unsolved": 3 / 4})
    assert found.images["least_eps"] == close([math.nan, *far])


def test_certified_shares_and_radii_are_those_of_certify():
    made = linear(0.0, 10.0, 20.0, 30.0, 100.0, -100.0)
    data = (made.images, made.labels)
    rows = certify(made.model, data, sigma=0.5, selection=100, samples=100, seed=0).certificates
    radii = [row.radius if row.right else 0.0 for row in rows]
    # where all copies agree, the bound of Clopper and Pearson is a root of their alpha
    assert radii[4] == close(0.5 * NormalDist().inv_cdf(0.001 ** (1 / 100)))
    proved = [sum(row.right for row in rows)] + [
        sum(r >= far for r in radii) for far in (0.25, 0.5)
    ]
    abstained = sum(row.abstains for row in rows)
    assert 6 > proved[0] > proved[1] > proved[2] > abstained > 0

    found = outcome("certificates", made)
    assert found.images == {"certified radius": close(radii)}
    assert found.values == close(
        {f"certified@{far}": count / 6 for far, count in zip((0, 0.25, 0.5), proved, strict=True)}
        | {"certified:abstained": abstained / 6, "certified radius": sum(radii) / 6}
    )


@pytest.mark.parametrize(("targets", "of_them"), [(3, 3), (9, 4)])
def test_apgd_is_that_of_evaluate_with_as_many_targets_as_there_are(
    moe, targets, of_them, monkeypatch
):
    """Also by what attacks say of themselves, since more targets may change no verdict."""
    described, attacked = [], Subject.attacked

    def spied(self, attack, *rest, **options):
        described.append(describe_attack(attack(self.model)))
        return attacked(self, attack, *rest, **options)

    monkeypatch.setattr(Subject, "attacked", spied)
    found = outcome("apgd", moe, radius=8.0, targeted_images=8, targets=targets)
    attacks = {
        "apgd-ce@8": APGD(moe.model, 8 / 255, steps=3, loss="ce"),
        "apgd-t@8": APGD(moe.model, 8 / 255, steps=3, loss="dlr", targets=of_them),
    }
    assert described == [describe_attack(attack) for attack in attacks.values()]
    report = evaluate(moe.model, moe.sample(8), attacks, batch_size=3, checks=False)
    held = {key: summary.robust.double() for key, summary in report.attacks.items()}
    assert found.values == {key: mean(row) for key, row in held.items()}
    assert found.images == {key: row.tolist() for key, row in held.items()}
    assert len(set(found.values.values())) == 2  # so that one is not the other


def test_derivatives_are_those_of_all_rows_of_the_jacobian(moe):
    images, labels = moe.sample(4)
    whole, constant_gates = (
        jacobian_matrix(moe.model, images, routing=routing).flatten(2).double()
        for routing in ("free", "gates_frozen")
    )
    logits, own = moe.logits(images, 4).double(), (range(4), labels)
    slopes = (whole[own][:, None] - whole).abs().sum(2)
    margins = logits[own][:, None] - logits
    r1 = (255 * margins / slopes).nan_to_num(nan=math.inf).min(1).values  # 0/0: the class itself
    through_gates = (whole - constant_gates).flatten(1).norm(dim=1)
    rows = {
        "r1": r1.where(r1 > 0, math.nan),
        "jacobian": torch.linalg.matrix_norm(whole, 2),
        "gate_share": through_gates / whole.flatten(1).norm(dim=1),
    }
    found = outcome("derivative", moe)
    assert found.images == {key: close(row.tolist()) for key, row in rows.items()}
    assert found.values == close({key: mean(row.nan_to_num(nan=0)) for key, row in rows.items()})


@torch.no_grad()
def test_distances_of_experts_are_those_of_their_own_mlps(moe):
    images, _ = moe.sample(4)
    with trace_routing(moe.model, keep_inputs=True) as trace:
        moe.model(images)
    terms, of_images, of_layers = layer_terms(moe.model, images), [], {}
    for name, layer in trace.layers.items():
        mlp = moe.layers[name].module
        hidden = layer.inputs @ mlp.fc1.weight.mT + mlp.fc1.bias[:, None]
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        outputs = hidden @ mlp.fc2.weight.mT + mlp.fc2.bias[:, None]  # experts, tokens, width
        ranks = layer.logits.sort(descending=True)
        best, second, third = (outputs[experts, range(20)] for experts in ranks.indices.T[:3])
        of_images.append(relative(best, second).view(4, -1).mean(1))
        margins = ranks.values[:, 1] - ranks.values[:, 2]
        whole = terms[name].whole_frobenius
        of_layers[name] = {
            "next_distance": mean(relative(second, third)),
            "expert_term": mean(terms[name].experts_frobenius / whole),
            "gate_term": mean(terms[name].gates_frobenius / whole),
            "boundary": 5 / 20 / float(margins.sort().values[5]),  # 5 of 20 tokens are nearer
        }

    found, both = outcome("top experts", moe), torch.stack(of_images).mean(0)
    assert found.images == {"top_distance": close(both.tolist())}
    first, last = of_layers.values()
    assert found.values == close(
        {"top_distance": mean(both)}
        | {f"{key}:{name}": value for name, of in of_layers.items() for key, value in of.items()}
        | {key: (first[key] + last[key]) / 2 for key in first}
    )


def relative(one, other):
    return 2 * (one - other).norm(dim=1) / (one.norm(dim=1) + other.norm(dim=1))


def test_swaps_are_as_near_as_images_are_put(moe):
    images, labels = moe.images[4:], moe.labels[4:]
    near = nearest_swaps(moe.model, images)
    wanted = torch.tensor([0.05, 0.2, 0.6, 3.0])  # one more within each radius
    ways = (1 - wanted / 255 / near.nearest).to(images)
    images = images + ways.view(-1, 1, 1, 1) * near.steps
    found = outcome("swaps", Subject(moe.model, images, labels), swap_images=4)

    near = nearest_swaps(moe.model, images)
    of_images = 255 * near.nearest
    of_tokens = 255 * torch.cat([layer.distances.flatten() for layer in near.layers.values()])
    jumps = swap_jumps(moe.model, images + near.steps, near).logits
    expected = {"swap": float(of_images.sort().values[1])}
    expected |= {"jump": mean(jumps), "jump:largest": float(jumps.max())}
    for place, radius in enumerate((0.1, 0.25, 1, 4), start=1):
        expected[f"swap@{radius}"] = place / 4
        expected[f"swap@{radius}:tokens"] = mean(of_tokens <= radius)
    assert found.values == close(expected)
    assert found.images == {"swap": close(of_images.tolist()), "jump": close(jumps.tolist())}


def test_slopes_and_curvature_are_those_of_the_library(moe):
    images, labels = moe.images[5:], moe.labels[5:]  # two of which have a nearer pair than "next"
    of = Subject(moe.model, images, labels)
    swaps = nearest_swaps(moe.model, images, pairs="next")
    options = {"swaps": swaps, "steps": 2, "bounds": (0.0, 1.0)}
    radii, slopes = (0.5, 2, 8, 32), {}
    for routing in ("free", "frozen"):
        given = [radius / 255 for radius in radii]
        changes = slope_profile(moe.model, images, given, routing=routing, **options).changes
        for radius, change in zip(radii, changes.T, strict=True):
            slopes[f"slope@{radius}:{routing}"] = mean(change) * 255 / radius
    assert outcome("slopes", of, radius=32.0).values == close(slopes)

    gamma = local_linearity(moe.model, images, labels, 32 / 255, restarts=1, **options).gamma
    free, frozen = mean(gamma["free"]), mean(gamma["frozen"])
    assert 0 < frozen < free
    assert outcome("curvature", of, radius=32.0).values == close(
        {"gamma@32:free": free, "gamma@32:frozen": frozen, "gamma@32:share": 1 - frozen / free}
    )


def test_the_least_radius_is_that_of_fab_with_so_many_targets(moe):
    images, labels = moe.sample(5)
    attack = FAB(moe.model, math.inf, steps=2, targets=3, early_stop=False)
    distances = 255 * stability(moe.model, images, labels, attack=attack).distances
    found = outcome("least radius", moe, local_images=5, least_steps=2)
    assert found.values == close({"least_eps": mean(distances), "least_eps:unsolved": 0})
    assert found.images == {"least_eps": close([math.nan, *distances[1:].tolist()])}


def test_steered_logits_are_compared_with_the_models_own():
    own = torch.tensor([[2 / 3, 1 / 3], [2 / 3, 1 / 3], [1 / 10, 9 / 10], [3 / 5, 2 / 5]]).log()
    other = torch.tensor([[1 / 4, 3 / 4], [2 / 3, 1 / 3], [1 / 10, 9 / 10], [3 / 5, 2 / 5]]).log()
    found = steered("key", other, own, torch.tensor([1, 0, 1, 1]))
    divergence = 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 9)  # of the first; 0 elsewhere
    assert found.values == close({"key": 3 / 4, "key:changed": 1 / 4, "key:kl": divergence / 4})
    assert found.images == {"key": [1, 1, 1, 0]}


def test_policies_bear_the_names_of_what_they_do():
    others = {
        "one expert": OneExpert(0),
        "average of all": AllExperts(),
        "drop best": DropBest(),
        "random": RandomExperts(seed=3),
        "lowest": Lowest(),
        "ranks 3 to K + 2": UseRanks(3),
        "random of best": RandomExperts(seed=3, among=4),
        "uniform": UniformGates(),
        "without rank 1": DropRank(1),
        "without rank 2": DropRank(2),
    }
    same_sum = {f"{name}, same sum": SameSum(policy) for name, policy in others.items()}
    last = {"permuted": PermuteExperts(seed=3), "renormalized": RenormalizedGates()}
    assert policies(8, 2, seed=3) == others | same_sum | last
