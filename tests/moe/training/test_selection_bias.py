"""The selection bias and its counts, whatever moves and casts the model."""

import copy

import pytest
import torch
from torch import nn

from ironmoe.moe import MoE, TopKRouter, update_selection_bias

DIM, EXPERTS = 16, 8


def router(**options):
    torch.manual_seed(0)
    options = {"score": "sigmoid", "selection_bias": True, "noise_std": 0.0, **options}
    return TopKRouter(DIM, EXPERTS, 2, **options)


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "type": lambda m: m.type(torch.bfloat16),
    "there and back": lambda m: m.bfloat16().float(),
    "apply": lambda m: m._apply(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t),
    "float8": lambda m: m.to(torch.float8_e4m3fn).to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_bias_and_its_bits(cast):
    model = nn.Sequential(MoE(DIM, 8, EXPERTS, router=router()))
    inner = model[0].router
    inner.selection_bias.copy_(torch.linspace(-1, 1, EXPERTS) / 3)
    inner.choices += 5
    bias = inner.selection_bias.clone()
    CASTS[cast](model)
    assert inner.selection_bias.dtype == torch.float32 and inner.selection_bias.equal(bias)
    assert inner.choices.dtype == torch.int64 and (inner.choices == 5).all()
    assert "selection_bias" in dict(inner.named_buffers())
    assert inner.weight.dtype == (torch.float32 if "back" in cast else inner.weight.dtype)


def test_float64_widens_it():
    inner = router()
    inner.selection_bias.fill_(0.1)
    assert inner.double().selection_bias.dtype == torch.float64
    assert inner.float().selection_bias.dtype == torch.float32
    assert router(dtype=torch.bfloat16).selection_bias.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_keep_it_wide(assign):
    inner = router(dtype=torch.bfloat16)
    inner.selection_bias.copy_(torch.linspace(-1, 1, EXPERTS) / 3)
    state = inner.state_dict()
    assert state["selection_bias"].dtype == torch.float32 and "choices" not in state
    other = router(dtype=torch.bfloat16)
    other.load_state_dict(copy.deepcopy(state), assign=assign)
    assert other.selection_bias.equal(inner.selection_bias)
    rounded = {name: value.bfloat16() for name, value in state.items()}
    other.load_state_dict(rounded, assign=assign)
    assert other.selection_bias.dtype == torch.float32


def replace_memory(module):
    """What the first version of FSDP does with ``MixedPrecision(buffer_dtype=…)``."""
    for buffer in module.buffers():
        buffer.data = buffer.to(torch.bfloat16)


@pytest.mark.parametrize("before", ["made", "loaded", "updated", "copied", "moved"])
def test_bits_come_back_where_a_library_replaced_the_memory_of_the_buffer(before):
    inner, x = router().train(), torch.randn(64, DIM)
    inner.selection_bias.copy_(torch.linspace(-1, 1, EXPERTS) / 3)
    if before == "loaded":
        state = {name: value + 0.01 for name, value in inner.state_dict().items()}
        inner.load_state_dict(state)
    elif before == "updated":
        inner(x)
        inner.update_selection_bias(1e-3)
    elif before == "copied":
        inner = copy.deepcopy(inner)
    elif before == "moved":
        inner = inner.double().float()
    bias = inner.selection_bias.clone()
    experts = copy.deepcopy(inner)(x).routing.experts
    for _ in range(2):
        replace_memory(inner)
        assert inner(x).routing.experts.equal(experts)
        assert inner.selection_bias.dtype == torch.float32 and inner.selection_bias.equal(bias)
    replace_memory(inner)
    inner.update_selection_bias(1e-3)
    torch.testing.assert_close((inner.selection_bias - bias).abs().max().item(), 1e-3)


def test_a_bias_that_a_functional_call_puts_in_is_used_as_it_is():
    inner, x = router(), torch.randn(64, DIM)
    low = torch.zeros(EXPERTS, dtype=torch.bfloat16)
    low[3] = 9
    routed = torch.func.functional_call(inner, {"selection_bias": low}, (x,))
    assert (routed.routing.experts == 3).any(1).all() and low.dtype == torch.bfloat16


def test_it_is_made_on_meta_and_reset():
    with torch.device("meta"):
        inner = router()
    assert inner.selection_bias.is_meta
    inner.to_empty(device="cpu")
    inner.selection_bias.fill_(float("nan"))
    inner.reset_parameters()
    assert (inner.selection_bias == 0).all() and (inner.choices == 0).all()
    assert inner.choices.device.type == "cpu"
    inner(torch.randn(3, DIM))
    assert inner.choices.sum() == 6


def busiest_over_mean(inner, x):
    """After a while of updates: the busiest expert's load over the mean load."""
    for _ in range(1500):
        inner(x)
        inner.update_selection_bias(1e-3)
    inner(x)
    load = inner.choices[:EXPERTS].double()
    return float(load.max() / load.mean())


def test_small_updates_even_out_the_load_of_a_bfloat16_model():
    """Starting from biases near 1, whose spacing in bfloat16 is 2⁻⁸, steps of 1e-3 would vanish."""
    x = torch.randn(512, DIM)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inner = router().to(dtype).train()
        inner.selection_bias += 1.0
        inner.selection_bias[0] += 0.5
        results.append(busiest_over_mean(inner, x.to(dtype)))
    assert max(results) < 1.1


def test_a_transform_counts_nothing():
    inner = router().train()
    parameters = {"weight": inner.weight.detach()}
    x = torch.randn(6, DIM)

    def loss(parameters):
        return torch.func.functional_call(inner, parameters, (x,)).routing.gates.square().sum()

    assert torch.func.grad(loss)(parameters)["weight"].abs().sum() > 0
    assert (inner.choices == 0).all()


def test_all_routers_of_a_model_are_updated_at_once():
    def make():
        shared = MoE(DIM, 8, EXPERTS, router=router())
        deeper = nn.Sequential(MoE(DIM, 8, EXPERTS, router=router(bias=True)))
        return nn.Sequential(shared, nn.ReLU(), MoE(DIM, 8, EXPERTS), shared, deeper)

    model, reference, x = make(), make(), torch.randn(5, DIM)
    reference.load_state_dict(model.state_dict())
    for each in (model, reference):
        torch.manual_seed(1)
        each(x)
    update_selection_bias(model, 0.1, all_processes=True)
    for layer in (reference[0], reference[4][0]):
        layer.router.update_selection_bias(0.1)
    for layer, expected in [(model[0], reference[0]), (model[4][0], reference[4][0])]:
        assert layer.router.selection_bias.equal(expected.router.selection_bias)
        assert layer.router.selection_bias.any() and not layer.router.choices.any()

    update_selection_bias(model)  # nothing was chosen since: nothing moves
    assert model[0].router.selection_bias.equal(reference[0].router.selection_bias)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), MoE(DIM, 8, EXPERTS)], ids=["none", "MoE"])
def test_a_model_without_a_selection_bias_cannot_be_updated(model):
    with pytest.raises(ValueError, match="must have a router made with selection_bias=True"):
        update_selection_bias(model)
