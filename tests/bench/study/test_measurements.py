"""What the study measures, against what the library says of the same model."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ironmoe.attacks import (
    PGD,
    AuxiliaryLoss,
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    evaluate,
)
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study.measure import paper_attack
from ironmoe.bench.study.measure.budget import Budget, quick_budget, robust_budget, with_radii
from ironmoe.bench.study.measure.interventions import policies
from ironmoe.bench.study.measure.measurement import MEASUREMENTS, Outcome, measurement
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.bench.study.measure.table import (
    FILES,
    QUICK,
    all_measurements,
    chosen,
    usual_measurements,
)
from ironmoe.moe import Capacity, VMoE, intervene, trace_routing
from ironmoe.moe.metrics import READINGS, routing_change
from ironmoe.moe.policies import Replay

BUDGET = Budget(
    radii=(8.0, 32.0), radius=32.0, clean_images=14, images=12, routed_images=10, targeted_images=4,
    paper_images=8, local_images=4, swap_images=3, steps=3, apgd_steps=3, targets=3,
    slope_steps=2, certified_images=2, samples=20, batch_size=6,
)  # fmt: skip


def model(experts=4, top_k=2, capacity=None):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16}
    moe = {"moe_layers": (0, 1), "num_experts": experts, "top_k": top_k} if experts else {}
    made = VMoE(**sizes, num_classes=5, channels=1, capacity=capacity, **moe)
    nn.init.normal_(made.head.weight, std=0.5)
    return made.eval()


def subject(made):
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = made(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    return Subject(made, images, labels)


@pytest.fixture(scope="module")
def moe():
    return subject(model())


def outcome(name, of, budget=BUDGET):
    return all_measurements()[name].measure(of, budget)


def close(expected):
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def mean(rows):
    return float(rows.double().mean())


@torch.no_grad()
def logits_of(made, images, policy=None):
    """In the batches of a measurement, since a policy may draw by the place in a batch."""
    with intervene(made, policy) if policy else nullcontext():
        return torch.cat([made(few) for few in images.split(BUDGET.batch_size)]).double()


def traced(made, images):
    with trace_routing(made) as trace:
        logits_of(made, images)
    return trace


def of_steered(key, logits, own, labels):
    """By hand: accuracy, changed predictions, and KL(own ‖ steered)."""
    right = logits.argmax(1) == labels
    changed = logits.argmax(1) != own.argmax(1)
    p, q = own.softmax(1), logits.softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    values = {key: mean(right), f"{key}:changed": mean(changed), f"{key}:kl": mean(divergence)}
    return Outcome(values, {key: right.double().tolist()})


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(paper_attack, "STEPS", 3)


@pytest.mark.parametrize("name", list(all_measurements()))
def test_a_measurement_repeats_itself_and_depends_on_the_settings_that_it_names(moe, name):
    """Else what is kept would be taken for another measurement."""
    seen = set()

    class Watched(Budget):
        def __getattribute__(self, field):
            if field in Budget._fields:
                seen.add(field)
            return super().__getattribute__(field)

    found = outcome(name, moe)
    again = outcome(name, subject(moe.model), Watched(*BUDGET))
    assert repr(again) == repr(found)  # NaN is not equal to itself
    assert seen - {"batch_size"} == set(all_measurements()[name].settings)

    assert found.values and all(math.isfinite(value) for value in found.values.values())
    assert all(len(row) <= len(moe.labels) for row in found.images.values())


def test_measurements_of_dense_models_ask_for_no_experts():
    dense = subject(model(experts=0))
    named = chosen(usual_measurements(), has_experts=False)
    assert {"clean", "curve", "paper", "apgd"} <= {each.name for each in named}
    assert not {"interventions", "routed attacks"} & {each.name for each in named}
    for each in named:
        assert each.measure(dense, BUDGET).values


def test_the_curve_is_that_of_evaluate_and_its_height_a_mean(moe):
    found = outcome("curve", moe)
    attack = PGD(moe.model, 32 / 255, steps=3)
    report = evaluate(moe.model, moe.sample(12), [attack], eps=[8 / 255, 32 / 255], checks=False)
    (summary,) = report.attacks.values()
    near, far = (summary.robust_at(radius / 255).double() for radius in (8, 32))
    rows = {"pgd@8": near, "pgd@32": far, "auc": (near + far) / 2}
    assert found.values == close({key: mean(row) for key, row in rows.items()})
    assert found.images == {key: row.tolist() for key, row in rows.items()}


def test_clean_accuracy_loss_and_margins_are_those_of_the_logits(moe):
    found = outcome("clean", moe)
    images, labels = moe.sample(14)
    logits = logits_of(moe.model, images)
    right = logits.argmax(1) == labels
    loss = nn.functional.cross_entropy(logits, labels)
    assert found.values == close({"clean": mean(right), "clean loss": float(loss)})
    assert found.images["clean"] == right.double().tolist() and 0 < mean(right) < 1
    others = logits.clone()
    others[range(14), labels] = -math.inf
    margins = logits[range(14), labels] - others.max(1).values
    assert found.images["margin"] == close(margins.tolist())


def test_expert_use_counts_gates_and_experts():
    made = subject(model())
    # without logits all tokens take the same two experts of four, each by a gate of a quarter
    nn.init.zeros_(made.model.blocks[0].mlp.router.weight)
    values = outcome("expert use", made).values
    layer = traced(made.model, made.images[:12]).layers["blocks.1.mlp"]
    load = [mean(layer.experts == expert) for expert in range(4)]
    sums = {
        "gate_sum": (0.5, mean(layer.gates.sum(1))),
        "load_entropy": (2, math.prod(share**-share for share in load)),
        "dormant": (2, load.count(0)),
    }
    assert values == close(
        {f"{key}:blocks.0.mlp": planted for key, (planted, _) in sums.items()}
        | {f"{key}:blocks.1.mlp": counted for key, (_, counted) in sums.items()}
        | {key: sum(both) / 2 for key, both in sums.items()}
    )


def test_interventions_are_what_intervene_makes(moe):
    clean, labels = moe.sample(14)
    attacked, expected = pgd_images(moe, 32), Outcome()
    for name, policy in {"none": None, **policies(4, 2, seed=0)}.items():
        for where, images in {"clean": clean, "attacked": attacked}.items():
            own, other = (logits_of(moe.model, images, each) for each in (None, policy))
            expected += of_steered(f"{name}:{where}", other, own, labels[: len(images)])
    found = outcome("interventions", moe)
    assert found.values == close(expected.values)
    assert found.images == expected.images


def pgd_images(moe, radius):
    attack = {"pgd": PGD(moe.model, radius / 255, steps=3, early_stop=False)}
    options = {"batch_size": 6, "keep_adversarial": True, "checks": False}
    report = evaluate(moe.model, moe.sample(10), attack, **options)
    return report.attacks["pgd"].adversarial


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (4, 1), (4, 2), (8, 2)])
def test_policies_are_those_that_e_and_k_allow(experts, top_k):
    names = policies(experts, top_k, seed=0)
    assert ("drop best" in names) == (experts > top_k)
    assert ("random of best" in names) == (experts > 2 * top_k)
    assert ("uniform, same sum" in names) == (top_k > 1)
    made = subject(model(experts, top_k))
    for policy in names.values():
        with intervene(made.model, policy):
            assert made.model(made.images).isfinite().all()


def test_the_papers_attack_changes_routing_as_traces_say():
    """With a capacity, without which all readings are one."""
    made = subject(model(capacity=Capacity(0.8)))
    images, labels = made.sample(8)
    own, clean = logits_of(made.model, images).argmax(1), traced(made.model, images)
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected, seen = {}, {"routing@0": images}
    for radius in (8, 32):
        attack = PGD.vmoe(made.model, radius / 255, 3, bounds=(0.0, 1.0))
        batches = zip(images.split(6), labels.split(6), strict=True)  # which share a capacity
        seen[f"routing@{radius}"] = attacked = torch.cat([attack(*few) for few in batches])
        seen[f"routing noise@{radius}"] = images + radius / 255 * signs
        assert attacked.min() < 0 and attacked.max() > 1  # as the official code leaves the range
        kept = logits_of(made.model, attacked.clamp(0, 1)).argmax(1)
        expected[f"vmoe-clipped@{radius}"] = mean(kept == labels)
        after = logits_of(made.model, attacked).argmax(1)
        expected[f"vmoe@{radius}"] = mean(after == labels)
        expected[f"vmoe@{radius}:changed"] = mean(after != own)
    for name, others in seen.items():
        trace = traced(made.model, others)
        for reading in READINGS:
            changes = {
                layer: routing_change(clean.layers[layer], trace.layers[layer], reading)
                for layer in clean.layers
            }
            expected[f"{name}:{reading}"] = sum(changes.values()) / 2
            expected |= {f"{name}:{reading}:{layer}": each for layer, each in changes.items()}
    assert outcome("paper", made).values == close(expected)
    assert len({expected[f"routing@32:{reading}"] for reading in READINGS}) == 3


def test_each_mode_of_attack_is_pgd_with_that_routing(moe, monkeypatch):
    """Also by what attacks say of themselves, since two modes may hold on the same images."""
    described, attacked = [], Subject.attacked

    def spied(self, attack, *rest, **options):
        described.append(describe_attack(attack(self.model)))
        return attacked(self, attack, *rest, **options)

    monkeypatch.setattr(Subject, "attacked", spied)
    found = outcome("routed attacks", moe, BUDGET._replace(radius=16.0))
    seen = dict(zip(found.images, described, strict=False))  # in the order of the modes
    attacks = {
        f"{mode}@16": PGD(moe.model, 16 / 255, steps=3, routing=routing)
        for mode, routing in {
            "free": None,
            "auxiliary": AuxiliaryLoss(),
            "frozen": FrozenRouting(),
            "gates": GatesOnly(),
            "experts": ExpertsOnly(),
        }.items()
    }
    report = evaluate(moe.model, moe.sample(10), attacks, batch_size=6, checks=False)
    for key, attack in attacks.items():
        robust = report.attacks[key].robust
        assert seen[key] == describe_attack(attack)
        assert found.values[key] == mean(robust)
        assert found.images[key] == robust.double().tolist()


def test_routing_is_replayed_on_attacked_and_on_clean_images(moe):
    clean, labels = moe.sample(10)
    attacked, expected = pgd_images(moe, 32), Outcome()
    assert moe.adversarial(BUDGET) is moe.adversarial(BUDGET)  # one run for several measurements
    ways = {"replayed@32": (attacked, clean), "rerouted@32": (clean, attacked)}
    for key, (images, routed_as) in ways.items():
        # a trace fits a batch of as many tokens
        logits = [
            logits_of(moe.model, few, Replay(traced(moe.model, others)))
            for few, others in zip(images.split(5), routed_as.split(5), strict=True)
        ]
        expected += of_steered(key, torch.cat(logits), logits_of(moe.model, images), labels)
    found = outcome("routed attacks", moe)
    modes = {f"{mode}@32" for mode in ("free", "auxiliary", "frozen", "gates", "experts")}
    assert set(found.values) - set(expected.values) == modes == set(found.images) - set(ways)
    assert {key: found.values[key] for key in expected.values} == close(expected.values)
    assert {key: found.images[key] for key in ways} == expected.images


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (4, 1)])
def test_measurements_take_models_without_swaps_and_with_one_expert_a_token(experts, top_k):
    made = subject(model(experts, top_k))
    use, near = outcome("top experts", made).values, outcome("swaps", made).values
    assert 0 < use["top_distance"] < 2 and use["expert_term"] > 0
    assert math.isnan(near["swap"]) == (experts == top_k)
    assert (near["swap@4"] == near["jump"] == 0) == (experts == top_k)
    if top_k == 1:  # then the second best expert is the next one
        assert use["top_distance"] == close(use["next_distance"])


def test_equal_experts_have_no_distance_and_do_not_jump():
    made = subject(model())
    usual = outcome("swaps", made).values["jump"]
    for layer in (block.mlp for block in made.model.blocks):
        for weights in (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias):
            weights.data[:] = weights.data[:1]
    use, near = outcome("top experts", made).values, outcome("swaps", made).values
    assert use["top_distance"] == pytest.approx(0, abs=1e-6)
    assert 0 <= near["jump"] < 0.1 * usual  # the swap is known to first order, so gates differ


def test_outcomes_with_one_name_are_refused():
    with pytest.raises(ValueError, match="names must be new, got \\['a'\\]"):
        Outcome({"a": 1.0}) + Outcome({"a": 2.0})
    assert Outcome({"a": 1.0}, {"b": [1.0]}) + Outcome() == Outcome({"a": 1.0}, {"b": [1.0]})


def test_settings_that_no_budget_has_are_refused():
    with pytest.raises(ValueError, match=r"fields of Budget, got \['sleep'\]"):
        measurement("new", "…", settings=("sleep",), passes=lambda budget: 0)
    assert "new" not in MEASUREMENTS


def test_every_file_of_the_table_registers_and_quick_names_exist():
    assert {each.measure.__module__ for each in MEASUREMENTS.values()} == {
        file.__name__ for file in FILES
    }
    assert set(QUICK) <= set(all_measurements())


def test_budgets():
    assert robust_budget(Budget(), 20.0).radii == (10.0, 20.0, 30.0, 40.0)
    assert with_radii(Budget(), None) == Budget()
    assert with_radii(Budget(), "4,1,2,3")[:2] == ((1.0, 2.0, 3.0, 4.0), 3.0)
    assert with_radii(Budget(), "5").radius == 5
    with pytest.raises(UserError, match="must be above 0, got '0,2'"):
        with_radii(Budget(), "0,2")
    assert quick_budget(Budget()).images < Budget().images
    assert quick_budget(Budget(images=3)).images == 3
