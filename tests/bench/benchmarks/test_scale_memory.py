"""The memory of a rank against hand counts, against what layers really hold, and against the models
of the papers."""

import pytest
import torch

from ironmoe.bench.benchmarks.passes import FULL, INFERENCE, saved_bytes
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.scale.layers import DEEPSEEK, LAYERS, Layer, World
from ironmoe.bench.benchmarks.scale.memory import (
    attack_memory,
    experts_gb,
    kept,
    training_memory,
)
from ironmoe.bench.benchmarks.scale.models import MODELS, Model, counted, layer_alone
from ironmoe.bench.benchmarks.shapes import REHEARSAL, Shape, make_problem
from ironmoe.moe import MoE, VMoE

TINY = Layer(Shape("tiny", 4, 8, 16, 2, 2, "gelu", bias=True))  # R = 8 rows of 16 bytes


def test_what_a_layer_alone_keeps_is_h_gates_indices_and_for_training_x():
    for shape in REHEARSAL:
        layer = Layer(shape, itemsize=4)
        problem = make_problem(shape, "uniform", torch.float32, torch.device("cpu"))
        frozen, trained = (kept(layer, World(1), trained=t) for t in (False, True))
        # autograd's hooks see H, the gates and x; indices are held beside them
        seen = saved_bytes(ironmoe, problem.frozen())
        assert frozen.total - frozen.gates == frozen.hidden == seen - shape.rows * 4
        assert frozen.gates == shape.rows * (4 + 4 * 4)
        assert trained.rows == saved_bytes(ironmoe, problem) - seen == shape.tokens * shape.dim * 4


def test_what_a_spread_layer_keeps_by_hand():
    """8 rows come back (16 bytes each), and the busiest rank has 12 rows of H (32 bytes)."""
    world = World(2, imbalance=1.5)
    assert kept(TINY, world, trained=False) == (12 * 32, 0, 8 * 16, (12 + 8) * 20)
    assert kept(TINY, world, trained=True) == (12 * 32, 12 * 16, 8 * 16, (12 + 8) * 20)
    again = kept(TINY, world, trained=True, recompute=True)
    assert again == (12 * 16, 0, 8 * 16, (12 + 8) * 20)


def test_memory_by_hand():
    assert attack_memory(1000, 100, World(4)) == (2 * (250 + 100), 0, 0)
    assert training_memory(1000, 200, World(4)) == (4 * 300, 4 * 300, 8 * 300)
    # 280 parameters of a rank's expert; FSDP2 over 2 groups holds a half, and gathers two layers
    world, layer = World(2), TINY._replace(repeats=3)
    assert experts_gb(layer, world, INFERENCE) == pytest.approx(3 * 280 * 2e-9)
    shared_out = experts_gb(layer, world, INFERENCE, shards=2)
    assert shared_out == pytest.approx((3 * 280 * 2 / 2 + 2 * 280 * 2) * 1e-9)
    activations = 3 * kept(TINY, world, trained=True).total
    assert experts_gb(layer, world, FULL) == pytest.approx((3 * 280 * 16 + activations) * 1e-9)


PUBLISHED = {  # arXiv 2106.05974, tables of upstream results: millions of parameters
    "V-MoE-L/16, every 2": 3446.0,
    "V-MoE-H/14, last 5": 2688.6,
    "V-MoE-H/14, every 2": 7160.8,
    "V-MoE-15B, every 2": 14705.1,
}


def test_models_have_the_parameters_that_the_paper_states():
    models = {model.name: model for model in MODELS}
    for name, millions in PUBLISHED.items():
        assert counted(models[name]).total * 1e-6 == pytest.approx(millions, abs=0.06), name


def test_counted_parameters_are_those_of_a_model_that_is_built():
    def small():
        return VMoE(8, 4, 16, 4, 2, 24, 5, moe_layers="every 2", num_experts=4)

    built, found = small(), counted(Model("small", small, 10))
    names = dict(built.named_parameters())
    experts = sum(p.numel() for name, p in names.items() if ".fc1." in name or ".fc2." in name)
    dense = sum(p.numel() for block in (0, 2) for p in built.blocks[block].mlp.parameters())
    assert found.experts == experts - dense
    assert found.total == sum(p.numel() for p in names.values())
    layer = found.layer
    assert (layer.repeats, layer.shape.sizes) == (2, (10, 16, 24, 4, 2)) and layer.shape.bias
    assert layer.repeats * layer.expert_numbers == found.experts


def test_a_layer_alone_is_the_layer():
    layer = Layer(Shape("gated", 10, 8, 16, 4, 2), shared=24)
    found = counted(layer_alone(layer))
    assert found.layer == layer and found.experts == layer.expert_numbers
    moe = MoE(8, 16, 4, 2, activation="swiglu", bias=False, shared_dim=24)
    assert found.total == sum(p.numel() for p in moe.parameters())


def test_the_layers_are_those_of_the_models_and_as_many():
    models = {model.name: counted(model).layer for model in MODELS}
    for layer, name in zip(LAYERS, ("V-MoE-L/16, every 2", "V-MoE-H/14, every 2"), strict=False):
        found = models[name]
        assert found.repeats == layer.repeats and found.shape.sizes == layer.shape.sizes
        assert found.expert_numbers == layer.expert_numbers
    deepseek = models["DeepSeek-V3, one layer"]
    assert deepseek.shape.sizes == DEEPSEEK.shape.sizes and deepseek.shared == DEEPSEEK.shared
