"""What the study measures, against what the library says of the same model."""

import math

import pytest
import torch

from ironmoe.attacks import PGD, evaluate
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
from ironmoe.moe import VMoE, intervene, trace_routing
from ironmoe.moe.policies import DropBest, Replay, SameSum

BUDGET = Budget(
    radii=(8.0, 32.0), radius=32.0, clean_images=14, images=12, routed_images=10, targeted_images=4,
    paper_images=8, local_images=4, swap_images=3, steps=3, apgd_steps=3, targets=3,
    slope_steps=2, certified_images=2, samples=20, batch_size=6,
)  # fmt: skip


def model(experts=4, top_k=2, **router):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16}
    moe = {"moe_layers": (0, 1), "num_experts": experts, "top_k": top_k} if experts else {}
    made = VMoE(**sizes, num_classes=5, channels=1, router=router, **moe)
    torch.nn.init.normal_(made.head.weight, std=0.5)
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


def test_the_curve_is_that_of_evaluate_and_its_area_a_mean(moe):
    found = outcome("curve", moe)
    attack = PGD(moe.model, 32 / 255, steps=3)
    report = evaluate(moe.model, moe.sample(12), [attack], eps=[8 / 255, 32 / 255], checks=False)
    (summary,) = report.attacks.values()
    clean, near, far = (
        float(row.double().mean())
        for row in (summary.clean_correct, summary.robust_at(8 / 255), summary.robust_at(32 / 255))
    )
    assert found.values["pgd@8"] == near and found.values["pgd@32"] == far
    area = (8 * (clean + near) / 2 + 24 * (near + far) / 2) / 32
    assert found.values["auc"] == pytest.approx(area)
    assert sum(found.images["auc"]) / 12 == pytest.approx(area)


def test_clean_accuracy_and_margins_are_those_of_the_logits(moe):
    found = outcome("clean", moe)
    images, labels = moe.sample(14)
    logits = moe.model(images).double()
    right = logits.argmax(1) == labels
    assert found.values["clean"] == right.double().mean() and 0 < found.values["clean"] < 1
    assert [margin > 0 for margin in found.images["margin"]] == right.tolist()


def test_interventions_are_what_intervene_makes(moe):
    found = outcome("interventions", moe)
    images, labels = moe.sample(14)
    with torch.no_grad(), intervene(moe.model, SameSum(DropBest())):
        steered = moe.model(images).argmax(1)
    own = moe.model(images).argmax(1)
    key = "drop best, same sum:clean"
    assert found.values[key] == (steered == labels).double().mean()
    assert found.values[f"{key}:changed"] == (steered != own).double().mean()
    assert found.values["none:clean:changed"] == 0 == found.values["none:clean:kl"]
    assert found.values[f"{key}:kl"] > 0
    assert found.images["none:attacked"] != found.images["none:clean"][:10]


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


def test_the_papers_attack_changes_routing_and_the_floors_do_less(moe):
    values = outcome("paper", moe).values
    assert values["routing@0:realised"] == 0  # without a capacity
    assert values["routing noise@32:kept"] > 0 and 0 < values["routing@32:kept"] <= 1
    layers = [values[f"routing@32:kept:blocks.{i}.mlp"] for i in range(2)]
    assert values["routing@32:kept"] == pytest.approx(sum(layers) / 2)
    assert values["vmoe@32:changed"] > 0


def test_replayed_routing_judges_the_images_of_the_free_model(moe):
    found = outcome("routed attacks", moe)
    modes = ("free", "auxiliary", "frozen", "gates", "experts", "replayed")
    assert set(found.values) == {f"{mode}@32" for mode in modes}

    images, labels = moe.sample(10)
    attacked = moe.adversarial(BUDGET)
    assert attacked is moe.adversarial(BUDGET)  # one run for several measurements
    right = (moe.model(attacked).argmax(1) == labels).double()
    assert found.images["free@32"] == right.tolist()
    with torch.no_grad(), trace_routing(moe.model) as trace:
        moe.model(images)
    with torch.no_grad(), intervene(moe.model, Replay(trace)):
        replayed = (moe.model(attacked).argmax(1) == labels).double()
    assert found.images["replayed@32"] == replayed.tolist()


def test_expert_use_counts_gates_and_experts(moe):
    values = outcome("expert use", moe).values
    assert 0 < values["gate_sum"] < 1 and 1 < values["load_entropy"] <= 4
    renormalized = outcome("expert use", subject(model(renormalize=True)))
    assert renormalized.values["gate_sum"] == pytest.approx(1)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (4, 1)])
def test_measurements_take_models_without_swaps_and_with_one_expert_a_token(experts, top_k):
    made = subject(model(experts, top_k))
    use, near = outcome("top experts", made).values, outcome("swaps", made).values
    assert 0 < use["top_distance"] < 2 and use["expert_term"] > 0
    assert math.isnan(near["swap"]) == (experts == top_k)
    assert (near["swap@4"] == near["jump"] == 0) == (experts == top_k)


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
