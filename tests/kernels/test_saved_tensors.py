"""What a layer keeps for the backward pass, and hooks of others around it."""

import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ironmoe.kernels import Routing, expert_mlp
from ironmoe.kernels.autograd.saved import saving

T, D, F, E = 6, 4, 5, 3


def layer_of(recompute):
    torch.manual_seed(0)
    w_in, w_out = torch.randn(E, F, D).double(), torch.randn(E, D, F).double()
    routing = Routing(torch.rand(T, 1).double(), torch.arange(T, dtype=torch.int32)[:, None] % E)
    return lambda x: expert_mlp(x, w_in, w_out, routing, recompute=recompute)


def dx(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), [x])[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_around_a_layer_keep_all_that_it_saves(recompute):
    packed = []
    layer = layer_of(recompute)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda kept: kept):
        found = dx(layer, x)

    assert torch.equal(found, dx(layer, x))
    assert {(E, F, D), (E, D, F)} <= set(packed)
    assert ((T // E, F) in packed) is not recompute


def test_what_a_layer_takes_goes_by_the_hooks_around_it():
    seen = []
    x = torch.randn(3, requires_grad=True)
    factor = torch.tensor([2.0, 3.0, 4.0])
    around = saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda kept: kept)

    with (
        around,
        saving(lambda t: 7 if t.data_ptr() == factor.data_ptr() else None, lambda _: 5 * x),
    ):
        y = (x * factor).sum() + x.exp().sum()
    (grad,) = torch.autograd.grad(y, [x])

    assert len(seen) == 1
    torch.testing.assert_close(grad, 5 * x.detach() + x.detach().exp())


def test_each_of_two_layers_gets_back_what_it_took():
    x = torch.randn(3, requires_grad=True)
    left, right = torch.ones(3), torch.ones(3)

    def taken(factor, value):
        return saving(
            lambda t: value if t.data_ptr() == factor.data_ptr() else None,
            lambda kept: torch.full((3,), kept),
        )

    with taken(left, 2.0), taken(right, 3.0):
        y = (x * left * right).sum()
    (grad,) = torch.autograd.grad(y, [x])
    assert grad.tolist() == [6.0] * 3


def test_a_saved_tensor_that_was_changed_is_an_error():
    x = torch.randn(3, requires_grad=True)
    factor = torch.ones(3)
    with saving(lambda _: None, lambda kept: kept):
        y = (x * factor).sum()
    factor.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.backward()


def test_an_operation_that_saves_its_output_does_not_keep_itself_alive():
    x = torch.randn(3, requires_grad=True)
    gc.disable()
    try:
        with saving(lambda _: None, lambda kept: kept):
            y = x.exp()
        memory = StorageWeakRef(y.untyped_storage())
        del y
        assert memory.expired()
    finally:
        gc.enable()


def test_checkpointing_around_a_layer_that_recomputes_keeps_its_input_alone():
    layer = layer_of(recompute=True)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    memory = []

    def block(x):
        tokens = x.tanh()
        memory.append(StorageWeakRef(tokens.untyped_storage()))
        return layer(tokens)

    y = checkpoint(block, x, use_reentrant=False)
    assert memory[0].expired()

    (found,) = torch.autograd.grad(y.square().sum(), [x])
    assert torch.equal(found, dx(lambda x: layer(x.tanh()), x))
