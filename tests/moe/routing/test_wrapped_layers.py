"""Layers, routers and capacities inside the wrappers of other libraries are found, seen and steered
as without them."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ironmoe.attacks.routing.layers import members_of
from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    MoE,
    TopKRouter,
    VMoE,
    intervene,
    routing_sites,
    trace_routing,
)
from ironmoe.moe.policies import AllExperts, DropBest

D, F, E, T = 6, 10, 4, 24


def compiled(module):
    return torch.compile(module, backend="eager")


def modules_to_save(module):
    others = pytest.importorskip("peft.utils.other")
    return others.ModulesToSaveWrapper(module, "default")


def data_parallel(module):
    return nn.DataParallel(module)


WRAPPERS = {
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "averaged": AveragedModel,
    "data parallel": data_parallel,
    "saved by PEFT": modules_to_save,
    "twice": lambda module: compiled(checkpoint_wrapper(module)),
}
ROUTERS = {
    "top-k": lambda: TopKRouter(D, E, 2),
    "expert choice": lambda: ExpertChoiceRouter(D, E, 1.0, tokens_per_group=8, multiple_of=1),
    "ensemble": lambda: EnsembleRouter(D, E, 2, ensemble_size=2),
}


def layer_with(router, capacity=None):
    torch.manual_seed(0)
    return MoE(D, F, E, router=router, capacity=capacity).eval()


def traced(layer, x, *policies):
    with trace_routing(layer) as trace:
        if not policies:
            return layer(x), trace
        with intervene(layer, list(policies)):
            return layer(x), trace


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_wrapped_router_is_traced_and_steered_as_the_router_itself(router, wrapper):
    torch.manual_seed(1)
    plain = layer_with(ROUTERS[router]())
    wrapped = copy.deepcopy(plain)
    wrapped.router = WRAPPERS[wrapper](wrapped.router)
    x = torch.randn(T, D)

    for policies in ([], [AllExperts(gates="renormalized")] if router == "top-k" else []):
        right, expected = traced(plain, x, *policies)
        y, trace = traced(wrapped, x, *policies)
        torch.testing.assert_close(y, right)
        assert list(trace.layers) == [""]
        assert torch.equal(trace.layers[""].experts, expected.layers[""].experts)
        torch.testing.assert_close(trace.layers[""].gates, expected.layers[""].gates)
    (site,), (plain_site,) = routing_sites(wrapped).values(), routing_sites(plain).values()
    assert members_of(site) == members_of(plain_site) == (2 if router == "ensemble" else 1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_capacity_is_seen_before_and_after(wrapper):
    plain = layer_with(TopKRouter(D, E, 2), Capacity(places=3, tokens_per_group=12))
    wrapped = copy.deepcopy(plain)
    wrapped.capacity = WRAPPERS[wrapper](wrapped.capacity)
    x = torch.randn(T, D)

    right, expected = traced(plain, x)
    y, trace = traced(wrapped, x)
    assert torch.equal(y, right) and not trace.layers[""].kept.all()
    assert torch.equal(trace.layers[""].experts, expected.layers[""].experts)
    assert torch.equal(trace.layers[""].intended.experts, expected.layers[""].intended.experts)


def small_vmoe():
    torch.manual_seed(0)
    model = VMoE(8, 4, 8, 2, 2, 16, 3, moe_layers=(0, 1), num_experts=E, channels=1).eval()
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_layers_and_models_in_wrappers_keep_their_names(wrapper):
    model, images = small_vmoe(), torch.rand(2, 1, 8, 8)
    names = list(routing_sites(model))
    with trace_routing(model) as expected:
        logits = model(images)

    model.blocks[0].mlp = WRAPPERS[wrapper](model.blocks[0].mlp)
    whole = WRAPPERS[wrapper](copy.deepcopy(model))
    for each in (model, whole):
        assert list(routing_sites(each)) == names == ["blocks.0.mlp", "blocks.1.mlp"]
        with trace_routing(each) as trace:
            torch.testing.assert_close(each(images), logits)
        for name, layer in trace.layers.items():
            assert torch.equal(layer.experts, expected.layers[name].experts)
        with intervene(each, DropBest(), layers=["blocks.0.mlp"]):
            assert not torch.allclose(each(images), logits)


def test_data_parallel_and_sharded_models_keep_the_names_of_their_layers():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = small_vmoe()
        for block in sharded.blocks:
            fully_shard(block.mlp)
        for model in (DistributedDataParallel(small_vmoe()), fully_shard(sharded)):
            with trace_routing(model) as trace:
                model(torch.rand(2, 1, 8, 8))
            assert list(trace.layers) == ["blocks.0.mlp", "blocks.1.mlp"]
            assert all(len(layer.experts) == 10 for layer in trace.layers.values())
    finally:
        dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = MoE(D, F, E)
        self.other = self.module
        self.last = MoE(D, F, E)


def test_a_users_attribute_called_module_is_no_wrapper_and_a_shared_layer_is_listed_once():
    assert list(routing_sites(Net())) == ["module", "last"]


def test_the_copy_that_peft_calls_is_the_one_that_is_seen():
    layer = layer_with(TopKRouter(D, E, 2))
    model = nn.Sequential(modules_to_save(layer))
    (copied,) = (site.module for site in routing_sites(model).values())
    assert copied is model[0].modules_to_save["default"] and copied is not layer
    with trace_routing(model) as trace:
        model(torch.randn(T, D))
    assert len(trace.layers["0"].experts) == T


def test_a_model_with_real_adapters_keeps_its_names_its_gates_and_its_trace():
    peft = pytest.importorskip("peft")
    model, images = small_vmoe(), torch.rand(2, 1, 8, 8)
    with intervene(model, AllExperts(gates="own")), trace_routing(model) as expected:
        logits = model(images)

    config = peft.LoraConfig(
        target_modules=["qkv"],
        target_parameters=["fc1.weight", "fc2.weight"],
        modules_to_save=["router"],
    )
    adapted = peft.get_peft_model(model, config).eval()
    with intervene(adapted, AllExperts(gates="own")), trace_routing(adapted) as trace:
        torch.testing.assert_close(adapted(images), logits)
    assert list(trace.layers) == list(expected.layers) == ["blocks.0.mlp", "blocks.1.mlp"]
    for name, layer in trace.layers.items():
        torch.testing.assert_close(layer.gates, expected.layers[name].gates)

    with adapted.disable_adapter(), trace_routing(adapted) as trace:
        adapted(images)
    assert all(len(layer.gates) == 10 for layer in trace.layers.values())


ADAPTERS = {
    "on experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "for a router": {"modules_to_save": ["gate"]},
    "for experts": {"modules_to_save": ["experts"]},
    "for a block": {"modules_to_save": ["mlp"]},
}


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_hugging_face_model_with_real_adapters_keeps_its_names_and_logits(adapters):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 32, (2, 7))
    with trace_routing(model) as expected:
        model(ids)

    options = {"target_modules": ["q_proj"], **ADAPTERS[adapters]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    with trace_routing(adapted) as trace:
        adapted(ids)
    assert list(trace.layers) == list(expected.layers)
    for name, layer in trace.layers.items():
        assert torch.equal(layer.experts, expected.layers[name].experts)
        torch.testing.assert_close(layer.logits, expected.layers[name].logits)


def test_experts_in_a_wrapper_and_nothing_around_them_are_found():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    for module in (experts, checkpoint_wrapper(experts)):
        assert [site.router for site in routing_sites(module).values()] == [None]


def test_a_masked_vision_transformer_is_traced_without_its_padding():
    model, images = small_vmoe(), torch.rand(2, 1, 8, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])
    with trace_routing(model) as trace:
        model(images, mask)
    for layer in trace.layers.values():
        assert len(layer.experts) == mask.sum() + 2 and len(layer.mask) == 10
