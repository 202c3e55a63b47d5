"""A model made on the meta device, given memory and reset, is a fresh model; whoever resets a
module resets its own parameters and no others."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    ExpertLinear,
    MoE,
    SoftMoE,
    TopKRouter,
    VMoE,
)
from ironmoe.moe.layers.mlp import Mlp
from ironmoe.moe.vit.attention import Attention, AttentionPool, Block

DIM = 32


def vmoe(**options):
    settings = {"moe_layers": (1,), "num_experts": 4, "channels": 1, "head_bias": -2.0} | options
    return lambda: VMoE(16, 4, DIM, 2, 2, 48, 5, **settings)


def layer(**options):
    return lambda: MoE(DIM, 48, 4, **options)


FAMILIES = {"selection_bias": True, "score": "sigmoid"}
MAKERS = {
    "experts": lambda: ExpertLinear(4, DIM, 48),
    "experts without a bias": lambda: ExpertLinear(4, DIM, 48, bias=False),
    "mlp": lambda: Mlp(DIM, 48),
    "gated mlp": lambda: Mlp(DIM, 48, "swiglu", bias=False),
    "attention": lambda: Attention(DIM, 4),
    "block": lambda: Block(DIM, 4, Mlp(DIM, 48)),
    "attention pool": lambda: AttentionPool(DIM, 4, 48),
    "router": lambda: TopKRouter(DIM, 8, 2, bias=True, **FAMILIES),
    "ensemble router": lambda: EnsembleRouter(DIM, 8, 2, ensemble_size=2),
    "expert choice router": lambda: ExpertChoiceRouter(DIM, 8),
    "moe": layer(),
    "moe without biases": layer(activation="swiglu", bias=False),
    "moe with a shared expert": layer(shared_dim=40),
    "moe with a gated shared expert": layer(shared_dim=40, shared_gate=True),
    "moe with a capacity": layer(capacity=Capacity(1.0)),
    "moe with a selection bias": lambda: MoE(
        DIM, 48, 4, router=TopKRouter(DIM, 4, 2, bias=True, **FAMILIES)
    ),
    "moe with expert choice": lambda: MoE(DIM, 48, 4, router=ExpertChoiceRouter(DIM, 4)),
    "timm's mlp layer": lambda: MoE.as_mlp_layer(4, shared_dim=40)(DIM, 48),
    "soft moe": lambda: SoftMoE(DIM, 48, 4, 2),
    "vit": vmoe(moe_layers=()),
    "vmoe": vmoe(),
    "vmoe, conv stem": vmoe(stem="conv"),
    "vmoe, gap": vmoe(classifier="gap"),
    "vmoe, map": vmoe(classifier="map"),
    "vmoe, representation": vmoe(representation_size=24),
    "vmoe, ensemble": vmoe(ensemble_size=2),
    "vmoe, soft": vmoe(make_moe=lambda: SoftMoE(DIM, 48, 4, 2)),
    "vmoe, shared expert": vmoe(make_moe=layer(shared_dim=40, shared_gate=True)),
}
ORDERS = {
    "parents first": list,
    "children first": lambda modules: list(modules)[::-1],
    "any order": lambda modules: random.Random(0).sample(list(modules), len(modules)),
}


def tensors_of(module, recurse=True):
    return dict(module.named_parameters(recurse=recurse)) | dict(
        module.named_buffers(recurse=recurse)
    )


@torch.no_grad()
def poison(module):
    """What memory without values may hold at worst."""
    for tensor in tensors_of(module).values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)


def is_poisoned(tensor):
    return tensor.isnan().all() if tensor.is_floating_point() else (tensor == -7).all()


def reset_each(modules):
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def made_on_meta(make):
    with torch.device("meta"):
        model = make()
    assert all(tensor.is_meta for tensor in tensors_of(model).values())
    return model.to_empty(device="cpu")


def draws(make_one, models=8):
    """name → the values of this tensor in several models."""
    torch.manual_seed(0)
    made = [tensors_of(make_one()) for _ in range(models)]
    return {
        name: torch.stack([model[name].detach().clone() for model in made]).double()
        for name in made[0]
    }


def assert_same_distribution(name, values, fresh):
    """Constants are equal. Of n random values each, mean, deviation and kurtosis differ by at most
    5 standard errors of a normal distribution, whose are the largest here: √(2/n), √(1/n) and
    √(48/n)."""
    assert values.shape == fresh.shape and values.isfinite().all(), name
    if (fresh == fresh.flatten()[0]).all():
        assert torch.equal(values, fresh), name
        return
    n, std = fresh.numel(), fresh.std()
    assert abs(values.mean() - fresh.mean()) <= 5 * (2 / n) ** 0.5 * std, name
    assert abs(values.std() / std - 1) <= 5 * (1 / n) ** 0.5, name
    kurtosis, expected = (((z - z.mean()) / z.std()).pow(4).mean() for z in (values, fresh))
    assert abs(kurtosis - expected) <= 5 * (48 / n) ** 0.5, name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_model_from_the_meta_device_is_reset_to_a_fresh_one(name, order):
    make = MAKERS[name]

    def reset_one():
        model = made_on_meta(make)
        poison(model)
        reset_each(ORDERS[order](list(model.modules())))
        return model

    fresh, values = draws(make), draws(reset_one)
    assert values.keys() == fresh.keys()
    for tensor in fresh:
        assert_same_distribution(tensor, values[tensor], fresh[tensor])


@pytest.mark.parametrize("name", MAKERS)
def test_each_module_resets_its_own_parameters_and_no_others(name):
    model = MAKERS[name]()
    for module in model.modules():
        poison(model)
        own = tensors_of(module, recurse=False)
        assert not own or hasattr(module, "reset_parameters"), type(module).__name__
        reset_each([module])
        for path, tensor in tensors_of(model).items():
            mine = any(tensor is other for other in own.values())
            assert tensor.isfinite().all() if mine else is_poisoned(tensor), path
            assert not (mine and is_poisoned(tensor)), path


def test_a_seed_draws_the_same_model_at_construction_and_at_a_reset():
    """One draw a parameter: a layer drawn twice would shift all that come after it."""
    torch.manual_seed(0)
    fresh = Mlp(DIM, 48)
    torch.manual_seed(0)
    again = made_on_meta(lambda: Mlp(DIM, 48))
    reset_each(again.modules())
    for ours, theirs in zip(again.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MAKERS)
def test_copies_on_the_meta_device_stay_there(name):
    with torch.device("meta"):
        model = MAKERS[name]()
    twin = copy.deepcopy(model)
    assert all(tensor.is_meta for tensor in tensors_of(twin).values())
    assert twin.state_dict().keys() == MAKERS[name]().state_dict().keys()


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (MoE, (DIM, 48, 4)), (SoftMoE, (DIM, 48, 4)), (ExpertLinear, (4, DIM, 48)),
        (Mlp, (DIM, 48)), (TopKRouter, (DIM, 4)), (ExpertChoiceRouter, (DIM, 4)),
    ],
)  # fmt: skip
def test_a_device_argument_and_skip_init_leave_no_value_behind(cls, sizes):
    on_meta = cls(*sizes, device="meta")
    assert all(tensor.is_meta for tensor in tensors_of(on_meta).values())
    model = nn.utils.skip_init(cls, *sizes)
    poison(model)
    reset_each(model.modules())
    assert all(tensor.isfinite().all() for tensor in tensors_of(model).values())


def test_a_model_resized_on_the_meta_device_is_reset_like_one_of_that_size():
    model = made_on_meta(lambda: vmoe()().resize(32))
    poison(model)
    reset_each(model.modules())
    assert model.pos_embedding.shape == (1, 65, DIM)
    positions = model.pos_embedding
    assert abs(positions.std() / 0.02 - 1) <= 5 * (0.5 / positions.numel()) ** 0.5
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", [name for name in MAKERS if "vmoe" in name])
def test_a_model_from_the_meta_device_takes_weights_and_gives_their_logits(name):
    """No value outside parameters and buffers is lost on the way over the meta device."""
    model, other = MAKERS[name]().eval(), made_on_meta(MAKERS[name]).eval()
    nn.init.normal_(model.head.weight)
    poison(other)
    reset_each(other.modules())
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(other(images), model(images))


def test_shards_of_fsdp2_are_reset_module_by_module(tmp_path):
    """The flow of torch's tutorial: shards on the meta device, memory, and a reset of each
    module."""
    make = MAKERS["vmoe, map"]
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = make()
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        model.to_empty(device="cpu")
        poison(model)
        torch.manual_seed(0)
        reset_each(model.modules())
        values = {name: p.full_tensor().detach() for name, p in model.named_parameters()}

        images = torch.rand(2, 1, 16, 16)
        model(images, torch.ones(2, 16, dtype=torch.bool)).square().sum().backward()
        assert model.head.bias.grad.full_tensor().any()
    finally:
        torch.distributed.destroy_process_group()

    for name, fresh in draws(make, models=1).items():
        assert_same_distribution(name, values[name].double()[None], fresh)


def test_the_initial_values_are_the_official_ones():
    """Xavier uniform weights, whose largest of n is near its bound (the chance to lie 2 % below it
    is 0.98ⁿ, under 1e-9 here); zero biases and class token; a head of 0 and its bias."""
    torch.manual_seed(0)
    model = vmoe(representation_size=40, classifier="map")()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.98 * bound <= module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name
    bound = (3 / DIM) ** 0.5
    assert 0.5 * bound <= model.pool.probe.abs().max() <= bound
    assert not model.head.weight.any() and (model.head.bias == -2.0).all()
    assert not vmoe()().cls.any()


def test_every_linear_layer_is_one_for_libraries_that_look_for_them():
    model = vmoe(classifier="map", representation_size=24)()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear == {
        "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
        "blocks.1.attn.qkv", "blocks.1.attn.proj", "pool.q", "pool.kv", "pool.proj",
        "pool.mlp.fc1", "pool.mlp.fc2", "pre_logits", "head",
    }  # fmt: skip
