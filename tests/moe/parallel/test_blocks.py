"""Which modules FSDP2 shards one by one, and with which options."""

import pytest
from torch import nn

from ironmoe.moe import MoE, VMoE
from ironmoe.moe.parallel.blocks import blocks
from ironmoe.moe.parallel.parallelize import _check_fsdp


def test_the_blocks_of_a_vision_transformer():
    model = VMoE(8, 4, 16, 2, 2, 24, 3, moe_layers=(1,), num_experts=4)
    assert list(blocks(model)) == list(model.blocks)


def test_blocks_of_several_classes_and_of_nested_models():
    """As in models whose layers are attention or a state space, dense or with experts."""
    layers = nn.ModuleList([nn.Linear(8, 8), MoE(8, 16, 4, 2), nn.LayerNorm(8)])
    model = nn.ModuleDict({"inner": nn.ModuleDict({"layers": layers}), "head": nn.Linear(8, 3)})
    assert list(blocks(model)) == list(layers)


def test_what_is_no_block():
    experts = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    mixed = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    alone = nn.ModuleList([nn.Linear(8, 8)])
    assert list(blocks(nn.ModuleDict({"a": experts, "b": mixed, "c": alone}))) == []

    without_weights = nn.ModuleList([nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8)])
    assert list(blocks(nn.ModuleDict({"a": without_weights}))) == list(without_weights)[1:]
    alike = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert list(blocks(nn.ModuleDict({"a": alike}))) == list(alike)


def test_options_that_nobody_has_are_errors():
    model = nn.Linear(2, 2)
    _check_fsdp(model, {}, ("ep",))
    _check_fsdp(model, {"reshard_after_forward": False}, ("fsdp", "ep"))
    with pytest.raises(ValueError, match="mesh must have a dimension 'fsdp' for mp_policy"):
        _check_fsdp(model, {"mp_policy": None}, ("ep",))
    for names in (("ep",), ("fsdp", "ep")):
        with pytest.raises(TypeError, match=r"fully_shard .*mp_policy.*, got 'dispatch_dtype'"):
            _check_fsdp(model, {"dispatch_dtype": None}, names)


def test_a_container_that_nobody_calls_is_refused_before_it_is_changed():
    containers = nn.ModuleList([MoE(8, 16, 4, 2)]), nn.ModuleDict({"a": MoE(8, 16, 4, 2)})
    for container in containers:
        _check_fsdp(container, {}, ("dp", "ep"))
        with pytest.raises(ValueError, match=r"module that is called.*got a Module"):
            _check_fsdp(container, {}, ("fsdp", "ep"))
