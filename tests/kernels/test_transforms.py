"""Derivatives of every kind: torch.func, forward mode, second order; each right or a clear error,
never silent zeros."""

import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ironmoe.kernels import (
    ACTIVATIONS,
    Routing,
    combine,
    expert_mlp,
    grouped_matmul,
    plan_dispatch,
    topk_route,
)
from ironmoe.moe import MoE

T, D, F, E, K = 5, 4, 6, 3, 2
INTERLEAVED = "clamped_swiglu_interleaved"
MODULES = [
    sys.modules[f"ironmoe.kernels.{name}"]
    for name in ("expert_mlp", "grouped_matmul", "combine", "dispatch", "topk")
]


@pytest.fixture(params=["tiles", "operators"])
def route(request, monkeypatch):
    """CPU tensors by the tile loop, or by the registered operators as GPU tensors go."""
    if request.param == "operators":
        for module in MODULES:
            monkeypatch.setattr(module, "takes_operators", lambda tensor: True)
    return request.param


def inputs(activation="gelu", tokens=T, dtype=torch.float64):
    wide = 2 * F if ACTIVATIONS[activation].gated else F
    shapes = ((tokens, D), (E, D), (E, wide, D), (E, D, F), (E, wide), (E, D))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def layer(x, w_router, w_in, w_out, b_in, b_out, activation="gelu", **options):
    routing = topk_route(x @ w_router.t(), K)
    return expert_mlp(
        x, w_in, w_out, routing, b_in=b_in, b_out=b_out, activation=activation, **options
    )


def on_x(leaves, **options):
    """The layer as a function of x alone."""
    weights = [leaf.detach() for leaf in leaves[1:]]
    return lambda x: layer(x, *weights, **options)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", INTERLEAVED])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_and_gradgradcheck(route, activation, recompute):
    def f(*leaves):
        return layer(*leaves, activation=activation, recompute=recompute)

    leaves = inputs(activation, 4)
    torch.autograd.gradcheck(f, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_gradgradcheck_of_the_parts(route):
    experts = torch.tensor([[0, 2], [E, 1], [2, 0]])  # one choice dropped
    plan = plan_dispatch(experts, E)
    rows, weight, bias = (
        torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((6, D), (E, F, D), (E, F))
    )
    gates, logits = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, K), (3, E)))
    torch.autograd.gradgradcheck(
        lambda x, w, b: grouped_matmul(x, w, plan.offsets, bias=b), (rows, weight, bias)
    )
    torch.autograd.gradgradcheck(lambda r, g: combine(r, Routing(g, experts), plan), (rows, gates))
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for order in ("score_first", "topk_first"):
            torch.autograd.gradgradcheck(
                lambda z, s=score, o=order: (
                    topk_route(z, K, score=s, order=o, renormalize=True).gates
                ),
                logits,
            )


@pytest.mark.parametrize("activation", ["gelu", INTERLEAVED])
def test_second_derivatives_through_the_kernels(device, activation):
    """A gradient penalty, as in adversarial training against curvature, on the kernels' own first
    derivatives."""
    leaves = [leaf.detach().float().to(device).requires_grad_() for leaf in inputs(activation)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = []
    for x, *weights in (leaves, exact):
        (dx,) = torch.autograd.grad(
            layer(x, *weights, activation=activation).sin().sum(), [x], create_graph=True
        )
        found.append(torch.autograd.grad(dx.square().sum(), [x, *weights]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_grad_and_vjp_equal_autograd(route):
    leaves = inputs()
    expected = torch.autograd.grad(layer(*leaves).sin().sum(), leaves)
    got = grad(lambda *inner: layer(*inner).sin().sum(), argnums=tuple(range(6)))(
        *(leaf.detach() for leaf in leaves)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    y, pullback = vjp(on_x(leaves), leaves[0].detach())
    torch.testing.assert_close(pullback(y.cos())[0], expected[0])


def test_functional_call_with_other_weights(route):
    module = MoE(D, F, E, K, dtype=torch.float64).eval()
    x = torch.randn(T, D, dtype=torch.float64)
    others = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    expected_module = MoE(D, F, E, K, dtype=torch.float64).eval()
    expected_module.load_state_dict(others)
    torch.testing.assert_close(functional_call(module, others, (x,)), expected_module(x))
    got = grad(lambda w: functional_call(module, w, (x,)).square().sum())(others)
    expected_module(x).square().sum().backward()
    for name, parameter in expected_module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


@pytest.mark.parametrize(
    ("in_dim", "activation"), [(0, "gelu"), (1, "gelu"), (0, INTERLEAVED), (0, "limited_swiglu")]
)
def test_vmap_over_the_batch_equals_a_loop(route, in_dim, activation):
    leaves = inputs(activation)
    batch = torch.randn(3, T, D, dtype=torch.float64)
    f = on_x(leaves, activation=activation)
    expected = torch.stack([f(x) for x in batch])
    torch.testing.assert_close(vmap(f, in_dims=in_dim)(batch.movedim(0, in_dim)), expected)
    expected_grads = torch.stack([grad(lambda x: f(x).sin().sum())(x) for x in batch])
    torch.testing.assert_close(vmap(grad(lambda x: f(x).sin().sum()))(batch), expected_grads)


def test_per_sample_weight_gradients(route):
    leaves = [leaf.detach() for leaf in inputs()]
    batch = torch.randn(3, T, D, dtype=torch.float64)

    def loss(w_in, b_out, x):
        return layer(x, leaves[1], w_in, *leaves[3:5], b_out).square().sum()

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(leaves[2], leaves[5], batch)
    each = [grad(loss, argnums=(0, 1))(leaves[2], leaves[5], x) for x in batch]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_vmap_over_models_equals_a_loop(route):
    x, w_router, *_ = (leaf.detach() for leaf in inputs())
    models = [[leaf.detach() for leaf in inputs()[2:]] for _ in range(3)]
    stacked = [torch.stack(leaves) for leaves in zip(*models, strict=True)]
    got = vmap(lambda *weights: layer(x, w_router, *weights))(*stacked)
    torch.testing.assert_close(
        got, torch.stack([layer(x, w_router, *weights) for weights in models])
    )


@pytest.mark.parametrize("activation", ["gelu", INTERLEAVED])
def test_jacobian_and_its_jacobian_by_reverse_mode(route, activation):
    leaves = inputs(activation, tokens=2)
    f, x = on_x(leaves, activation=activation), leaves[0].detach()
    torch.testing.assert_close(jacrev(f)(x), torch.autograd.functional.jacobian(f, x))

    def scalar(x):
        return f(x).sin().sum()

    torch.testing.assert_close(
        jacrev(jacrev(scalar))(x), torch.autograd.functional.hessian(scalar, x)
    )


def directional(f, x, tangent, h=1e-6):
    return (f(x + h * tangent) - f(x - h * tangent)) / (2 * h)


@pytest.mark.parametrize("activation", ["gelu", INTERLEAVED, "limited_swiglu", "geglu_tanh"])
def test_forward_mode_is_right(route, activation):
    leaves = inputs(activation)
    f, x = on_x(leaves, activation=activation), leaves[0].detach()
    tangent = torch.randn_like(x)
    expected = directional(f, x, tangent)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], expected, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(
            forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-6, atol=1e-6
        )


def test_forward_mode_of_the_parts_is_right(route):
    experts = torch.tensor([[0, 2], [E, 1], [2, 0]])
    plan = plan_dispatch(experts, E)
    weight, gates = torch.randn(E, F, D, dtype=torch.float64), torch.rand(3, K, dtype=torch.float64)
    rows, logits = torch.randn(6, D, dtype=torch.float64), torch.randn(3, E, dtype=torch.float64)
    for f, x in (
        (lambda r: grouped_matmul(r, weight, plan.offsets), rows),
        (lambda r: combine(r, Routing(gates, experts), plan), rows),
        (lambda z: topk_route(z, K, renormalize=True).gates, logits),
    ):
        tangent = torch.randn_like(x)
        expected = directional(f, x, tangent)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transform", [jacfwd, hessian])
def test_forward_mode_under_vmap_is_a_clear_error(route, transform):
    leaves = inputs()
    with pytest.raises(NotImplementedError, match="use jacrev"):
        transform(lambda x: on_x(leaves)(x).sum())(leaves[0].detach())


def test_kernels_under_transforms(device):
    """The same through Triton: float32 against float64."""
    leaves = [leaf.detach().float().to(device) for leaf in inputs()]
    exact = [leaf.double() for leaf in leaves]
    batch = torch.randn(3, T, D, device=device)
    got = vmap(grad(lambda x: on_x(leaves)(x).sin().sum()))(batch)
    want = vmap(grad(lambda x: on_x(exact)(x).sin().sum()))(batch.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    tangent = torch.randn_like(leaves[0])
    got = jvp(on_x(leaves), (leaves[0],), (tangent,))[1]
    torch.testing.assert_close(
        got.double(), jvp(on_x(exact), (exact[0],), (tangent.double(),))[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("device_type", ["twin", "kernel"])
def test_recomputing_gives_the_same_bits(request, device_type):
    where = request.getfixturevalue("device") if device_type == "kernel" else "cpu"
    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        leaves = [leaf.detach().float().to(where).requires_grad_() for leaf in inputs()]
        grads.append(torch.autograd.grad(layer(*leaves, recompute=recompute).sin().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recomputing_after_an_input_was_changed_is_an_error(route):
    leaves = inputs()
    x = leaves[0].detach().clone()
    gates = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    routing = Routing(gates, topk_route(torch.randn(T, E), K).experts)
    y = expert_mlp(x, leaves[2], leaves[3], routing, recompute=True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()
