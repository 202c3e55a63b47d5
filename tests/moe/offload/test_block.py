"""What ``offload_experts`` changes in a model, refuses, and restores."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ironmoe.moe import MoE, SoftMoE, VMoE, freeze_weights, offload_experts
from ironmoe.moe.example import ARGUMENTS, trained_model

DIM = 8


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), MoE(DIM, 16, 4), MoE(DIM, 8, 3))
    model[2].fc1.bias.requires_grad_(False)
    return model.eval()


def state_of(model):
    return [
        (name, t.device, t.requires_grad, id(t), t.detach().clone())
        for name, t in model.state_dict(keep_vars=True).items()
    ]


def assert_same_state(found, expected):
    assert [entry[:4] for entry in found] == [entry[:4] for entry in expected]
    assert all(torch.equal(a[4], b[4]) for a, b in zip(found, expected, strict=True))


def test_inside_the_block_experts_are_frozen_and_afterwards_all_is_as_before():
    model = model_of()
    before, attributes = state_of(model), set(vars(model[2]))
    with offload_experts(model):
        assert not any(p.requires_grad for p in (*model[2].fc1.parameters(), model[3].fc2.weight))
        assert model[0].weight.requires_grad
        assert model[2].router.weight.requires_grad
    assert_same_state(state_of(model), before)
    assert set(vars(model[2])) == attributes
    assert model[2].offloaded is None


def test_an_exception_inside_the_block_restores_the_model():
    model = model_of()
    before = state_of(model)
    with pytest.raises(KeyError, match="of the user"), offload_experts(model, keep=1):
        model(torch.randn(3, DIM))
        raise KeyError("of the user")
    assert_same_state(state_of(model), before)
    assert model[3].offloaded is None


def test_a_pass_that_fails_leaves_the_next_one_right():
    model, x = model_of(), torch.randn(5, DIM)
    expected = model(x)
    with offload_experts(model, keep=2):
        with pytest.raises(ValueError, match=r"x must be torch\.float32 like the weights"):
            model[2](x.double())  # seen when the experts are there
        assert torch.equal(model(x), expected)


def test_blocks_one_after_another_and_for_parts_of_a_model_work():
    model, x = model_of(), torch.randn(5, DIM)
    expected = model(x)
    for keep in (0, 4):
        with offload_experts(model, keep=keep):
            assert torch.equal(model(x), expected)
    with offload_experts(model[2]), offload_experts(model[3]):
        assert torch.equal(model(x), expected)


def test_state_dict_inside_the_block_has_all_weights():
    model = trained_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with offload_experts(model):
        inside = model.state_dict()
        assert list(inside) == list(before)
        assert all(torch.equal(inside[name], before[name]) for name in before)
        VMoE(**ARGUMENTS).load_state_dict(inside)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_the_block_is_not_offloaded(duplicate):
    model, x = model_of(), torch.randn(5, DIM)
    with offload_experts(model, keep=1) as offload:
        expected = model(x)
        copied = duplicate(model)
        before = offload.copied_bytes
        assert torch.equal(copied(x), expected)
        assert offload.copied_bytes == before
    with offload_experts(copied):
        assert torch.equal(copied(x), expected)


def test_weights_that_require_grad_again_are_an_error_where_gradients_are_recorded():
    model, x = model_of(), torch.randn(5, DIM)
    with offload_experts(model):
        model[2].fc2.weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match="must not require grad"):
            model(x)
        with torch.no_grad():
            model(x)
        with freeze_weights(model):
            model(x)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda m: nn.Linear(2, 2), {}, "model must have MoE or SoftMoE layers"),
        (lambda m: m, {"keep": -1}, "keep must be at least 0, got -1"),
        (lambda m: m, {"device": "meta"}, "device must be one that computes, got 'meta'"),
        (lambda m: m.to("meta"), {"device": "cpu"}, "must have values"),
        (lambda m: m, {"device": "nowhere"}, "device must be one that this machine has"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_by_name(change, arguments, message):
    model = change(model_of())
    with pytest.raises(ValueError, match=message), offload_experts(model, **arguments):
        pass


def test_what_is_no_model_and_no_number_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"), offload_experts(abs):
        pass
    with pytest.raises(TypeError, match="keep must be a whole number"):
        offload_experts(model_of(), keep=1.5).__enter__()


def test_nested_blocks_are_refused_and_the_outer_one_goes_on():
    model, x = model_of(), torch.randn(5, DIM)
    expected = model(x)
    with offload_experts(model):
        with pytest.raises(ValueError, match="offloaded already, got the layer '2'"):
            offload_experts(model).__enter__()
        assert torch.equal(model(x), expected)


def test_experts_in_a_wrapper_are_refused():
    model = model_of()
    model[2].fc1 = nn.Sequential(model[2].fc1)
    with pytest.raises(ValueError, match="'2' must be ExpertLinear modules, got a Sequential"):
        offload_experts(model).__enter__()


@pytest.mark.parametrize(
    "change",
    [
        lambda fc: prune.l1_unstructured(fc, "weight", 0.5),
        lambda fc: parametrizations.weight_norm(fc, dim=0),
    ],
)
def test_weights_that_are_computed_in_each_pass_are_offloaded(change):
    model, x = model_of(), torch.randn(5, DIM, requires_grad=True)
    change(model[2].fc1)
    (expected,) = torch.autograd.grad(model(x).square().sum(), [x])
    with offload_experts(model, keep=4):
        for _ in range(2):
            (found,) = torch.autograd.grad(model(x).square().sum(), [x])
            assert torch.equal(found, expected)


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr("ironmoe.moe.offload.offload.is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="weights whole in this process"):
        offload_experts(model_of()).__enter__()


def test_a_device_is_named_or_that_of_the_other_weights():
    for layer in (MoE(DIM, 8, 2), SoftMoE(DIM, 8, 2)):
        with offload_experts(layer) as found, offload_experts(MoE(DIM, 8, 2), "cpu") as named:
            assert found.device == named.device == torch.device("cpu")
