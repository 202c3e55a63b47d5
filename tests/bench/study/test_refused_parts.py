"""What a model refuses is missing in a measurement and said; all else is there."""

import math

import pytest
import torch
from torch import nn

from ironmoe.bench.study.measure import interventions, local_smoothness
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.moe import ExpertChoiceRouter, MoE, VMoE

BUDGET = Budget(
    radii=(8.0,), radius=8.0, clean_images=4, images=4, routed_images=4, local_images=4,
    swap_images=2, steps=2, slope_steps=1, batch_size=4,
)  # fmt: skip
NO_BALANCE = {"importance_weight": 0.0, "load_weight": 0.0}


def subject(experts=4, **how):
    torch.manual_seed(0)
    made = VMoE(
        8, 4, 16, 2, 2, 16, 3, channels=1, moe_layers=[1], num_experts=experts, top_k=1, **how
    )  # fmt: skip
    nn.init.normal_(made.head.weight)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Subject(made, images, made.eval()(images).argmax(1))


def choosing_experts():
    router = ExpertChoiceRouter(16, 4, 2.0, images_per_group=1)
    return MoE(16, 16, 4, router=router)


def outcome(name, of):
    return all_measurements()[name].measure(of, BUDGET)


def test_without_balance_losses_the_other_attacks_that_know_routing_are_there():
    found = outcome(
        "routed attacks", subject(router={"importance_weight": 0.0, "load_weight": 0.0})
    )
    named = {key.partition("@")[0] for key in found.values}
    assert named == {"free", "frozen", "gates", "experts", "replayed", "rerouted"}
    (problem,) = found.problems
    assert problem.startswith("auxiliary: ") and "balance" in problem


def test_one_policy_that_is_refused_leaves_the_others(monkeypatch):
    plain = subject()

    class Refusing:
        def __call__(self, decision):
            raise ValueError("not here")

    made = interventions.policies(4, 1, 0)
    bad = {name: Refusing() for name in ("random", "lowest")}
    monkeypatch.setattr(interventions, "policies", lambda *_: made | bad)
    found = outcome("interventions", plain)
    assert "drop best:clean" in found.values and "none:attacked" in found.values
    assert not {"random:clean", "lowest:attacked"} & set(found.values)
    assert found.problems == ("random, lowest: not here",)


def test_without_the_part_of_the_gates_the_radius_is_there(monkeypatch):
    def refuse(*_):
        raise ValueError("not here")

    monkeypatch.setattr(local_smoothness, "network_terms", refuse)
    found = outcome("derivative", subject())
    assert set(found.values) == {"r1", "jacobian"} and found.problems == ("gate_share: not here",)


@pytest.mark.parametrize(
    ("name", "there", "missing"),
    [
        ("slopes", "slope@8:free", "slope@8:frozen"),
        ("curvature", "gamma@8:free", "gamma@8:frozen"),
        ("top experts", "top_distance", "expert_term"),
    ],
)
def test_where_routing_cannot_be_held_the_rest_is_there(name, there, missing):
    """Experts that choose their tokens."""
    found = outcome(name, subject(make_moe=choosing_experts))
    assert math.isfinite(found.values[there]) and missing not in found.values
    assert len(found.problems) == 1


def test_one_expert_has_no_other_to_differ_from():
    found = outcome("top experts", subject(experts=1))
    assert math.isnan(found.values["top_distance"])
