"""Work follows demand: matrix products and saved bytes, counted."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ironmoe.kernels import Routing, expert_mlp, topk_route

T, D, F, E, K = 24, 8, 12, 3, 2
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "_linear_pointwise", "einsum", "linear"}


class Count(TorchDispatchMode):
    """Matrix products seen, by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.shapes.append(tuple(out.shape))
        return out


def make(requires_grad, bias=False, gates_grad=True):
    leaves = {
        "w_in": torch.randn(E, F, D),
        "w_out": torch.randn(E, D, F),
        "b_in": torch.randn(E, F) if bias else None,
        "b_out": torch.randn(E, D) if bias else None,
    }
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_(requires_grad)
    routing = topk_route(torch.randn(T, E), K)
    gates = routing.gates.detach().requires_grad_(gates_grad)
    x = torch.randn(T, D, requires_grad=True)
    return x, leaves, Routing(gates, routing.experts)


def saved_during(f):
    """(result, tensors saved for backward: shapes and data pointers)."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = f()
    return result, saved


def products(f):
    with Count() as count:
        f()
    return count.shapes


def tiles_of(routing):
    return len(routing.experts.unique())


@pytest.mark.parametrize("trainable", [False, True])
def test_input_gradient_costs_two_products_a_tile_and_no_weight_gradient(trainable):
    x, leaves, routing = make(trainable)
    y = expert_mlp(x, leaves["w_in"], leaves["w_out"], routing)
    shapes = products(lambda: torch.autograd.grad(y.sum(), [x]))
    assert len(shapes) == 2 * tiles_of(routing)
    assert (F, D) not in shapes and (D, F) not in shapes


def test_full_backward_costs_four_products_a_tile():
    x, leaves, routing = make(True)
    shapes = products(
        lambda: expert_mlp(x, leaves["w_in"], leaves["w_out"], routing).sum().backward()
    )
    assert shapes.count((F, D)) == shapes.count((D, F)) == tiles_of(routing)
    assert len(shapes) == (2 + 4) * tiles_of(routing)


@pytest.mark.parametrize(
    ("wanted", "per_tile"),
    [
        (["w_in"], 2),
        (["w_out"], 1),
        (["b_out"], 0),
        (["b_in"], 1),
        (["gates"], 1),
        (["x", "w_in"], 3),
        (["x", "w_out"], 3),
    ],
)
def test_each_demand_costs_its_own_products(wanted, per_tile):
    x, leaves, routing = make(True, bias=True)
    everything = {"x": x, "gates": routing.gates, **leaves}
    y = expert_mlp(
        x, leaves["w_in"], leaves["w_out"], routing, b_in=leaves["b_in"], b_out=leaves["b_out"]
    )
    shapes = [
        s
        for s in products(lambda: torch.autograd.grad(y.sum(), [everything[k] for k in wanted]))
        if len(s) == 2
    ]
    assert len(shapes) == per_tile * tiles_of(routing)


def test_backward_with_inputs_is_task_aware_too():
    x, leaves, routing = make(True)
    y = expert_mlp(x, leaves["w_in"], leaves["w_out"], routing)
    assert len(products(lambda: y.sum().backward(inputs=[x]))) == 2 * tiles_of(routing)
    assert leaves["w_in"].grad is None and x.grad is not None


def test_non_leaf_and_shared_weights_follow_demand():
    """Parametrized or tied weights are results of other operations; the demand reaches through
    them."""
    x, _, routing = make(True)
    base = torch.randn(E, F, D, requires_grad=True)

    def forward():
        return expert_mlp(x, base * 2, (base * 0.5).transpose(1, 2), routing)

    y = forward()
    assert len(products(lambda: torch.autograd.grad(y.sum(), [x]))) == 2 * tiles_of(routing)
    (grad,) = torch.autograd.grad(forward().sum(), [base])
    step = 1e-3 * torch.randn_like(base)
    with torch.no_grad():
        before = forward().double().sum()
        base += step
        change = forward().double().sum() - before
    torch.testing.assert_close(change, (grad * step).sum().double(), rtol=2e-2, atol=1e-3)


def test_frozen_weights_save_pre_activations_gates_and_nothing_else_of_their_size():
    x, leaves, routing = make(False)
    _, saved = saved_during(lambda: expert_mlp(x, leaves["w_in"], leaves["w_out"], routing))
    weights = {leaves["w_in"].data_ptr(), leaves["w_out"].data_ptr()}
    others = [t for t in saved if t.data_ptr() not in weights]
    assert not any(t.data_ptr() == x.data_ptr() for t in others), "the expert input was kept"
    assert sum(t.numel() for t in others if t.shape[-1] == F) == T * K * F
    assert sum(t.nbytes for t in others) == 4 * (T * K * F + T * K)


def test_trainable_weights_add_the_input_itself_and_no_gathered_copy():
    x, leaves, routing = make(True)
    _, saved = saved_during(lambda: expert_mlp(x, leaves["w_in"], leaves["w_out"], routing))
    weights = {leaves["w_in"].data_ptr(), leaves["w_out"].data_ptr()}
    others = [t for t in saved if t.data_ptr() not in weights]
    assert [t.data_ptr() for t in others].count(x.data_ptr()) == 1
    assert sum(t.nbytes for t in others) == 4 * (T * K * F + T * K + T * D)


def test_nothing_is_saved_where_no_gradient_can_come():
    x, leaves, routing = make(False, gates_grad=False)
    assert (
        saved_during(lambda: expert_mlp(x.detach(), leaves["w_in"], leaves["w_out"], routing))[1]
        == []
    )
    with torch.no_grad():
        assert (
            saved_during(lambda: expert_mlp(x, leaves["w_in"], leaves["w_out"], routing))[1] == []
        )


def test_bias_of_the_second_layer_alone_needs_no_pre_activations():
    x, leaves, routing = make(False, bias=True, gates_grad=False)
    b_out = leaves["b_out"].requires_grad_()
    _, saved = saved_during(
        lambda: expert_mlp(x.detach(), leaves["w_in"], leaves["w_out"], routing, b_out=b_out)
    )
    assert not any(t.shape[-1] == F and t.ndim == 2 for t in saved)


def test_frozen_and_trainable_weights_give_the_same_bits():
    grads = []
    for trainable in (False, True):
        torch.manual_seed(1)
        x, leaves, routing = make(trainable)
        y = expert_mlp(x, leaves["w_in"], leaves["w_out"], routing)
        grads.append(torch.autograd.grad(y.sum(), [x, routing.gates]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gate_gradient_is_exact_at_gate_zero():
    x, leaves, routing = make(False, bias=True)
    zero = Routing(torch.zeros_like(routing.gates, requires_grad=True), routing.experts)
    biases = {"b_in": leaves["b_in"], "b_out": leaves["b_out"]}
    (grad,) = torch.autograd.grad(
        expert_mlp(x, leaves["w_in"], leaves["w_out"], zero, **biases).sum(), [zero.gates]
    )
    one_by_one = torch.zeros_like(grad)
    for k in range(K):
        gates = torch.zeros(T, K)
        gates[:, k] = 1
        one_by_one[:, k] = expert_mlp(
            x, leaves["w_in"], leaves["w_out"], Routing(gates, routing.experts), **biases
        ).sum(1)
    torch.testing.assert_close(grad, one_by_one)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, leaves, routing = make(True)

    def forward(x):
        return expert_mlp(x, leaves["w_in"], leaves["w_out"], routing)

    plain = torch.autograd.grad(forward(x).sum(), [x, leaves["w_in"]])
    again = torch.autograd.grad(
        checkpoint(forward, x, use_reentrant=False).sum(), [x, leaves["w_in"]]
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    y = checkpoint(forward, x, use_reentrant=False)
    shapes = products(lambda: torch.autograd.grad(y.sum(), [x]))
    assert (F, D) not in shapes and (D, F) not in shapes


def test_compiled_layer_gives_the_same_gradients():
    x, leaves, routing = make(True)

    def layer(x):
        return expert_mlp(x, leaves["w_in"], leaves["w_out"], routing)

    compiled = torch.compile(layer, backend="eager")
    wanted = [x, leaves["w_in"]]
    for got, want in zip(
        torch.autograd.grad(compiled(x).sum(), wanted),
        torch.autograd.grad(layer(x).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
