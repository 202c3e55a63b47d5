import sys

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ironmoe.kernels import ACTIVATIONS, Routing, expert_mlp, plan_dispatch, topk_route


def run(leaves, routing, act="gelu"):
    rest = {k: leaves.get(k) for k in ("b_in", "b_out")}
    return expert_mlp(leaves["x"], leaves["w_in"], leaves["w_out"], routing, activation=act, **rest)


@pytest.mark.parametrize(
    ("act", "bias"), [*((act, True) for act in ACTIVATIONS), ("gelu", False), ("swiglu", False)]
)
def test_gradcheck_and_gradgradcheck_through_router_gates_and_biases(act, bias):
    leaves = oracle.layer(5, 3, 2, 3, gated=ACTIVATIONS[act].gated, bias=bias)
    w_router = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    names = list(leaves)

    def layer(w_router, *tensors):
        given_leaves = dict(zip(names, tensors, strict=True))
        return run(
            given_leaves, topk_route(given_leaves["x"] @ w_router.t(), 2, renormalize=True), act
        )

    inputs = (w_router, *leaves.values())
    assert torch.autograd.gradcheck(layer, inputs)
    # Along a random direction an input: entry by entry it takes much longer.
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_second_derivative_of_frozen_layer(act):
    """Nothing but x requires grad, so x itself is not saved; its second derivative must be there
    all the same."""
    leaves = oracle.layer(4, 3, 2, 3, gated=ACTIVATIONS[act].gated)
    frozen = {k: v.detach() for k, v in leaves.items()}
    routing = topk_route(torch.randn(4, 3, dtype=torch.float64), 2)
    assert torch.autograd.gradgradcheck(lambda x: run(frozen | {"x": x}, routing, act), leaves["x"])


def test_third_derivative():
    leaves = oracle.layer(2, 2, 2, 2, bias=False)
    routing = topk_route(torch.randn(2, 2, dtype=torch.float64), 2)
    x = leaves["x"]

    def third(f):
        y = f().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = (g**2).sum()
        return y

    ours = third(lambda: run(leaves, routing))
    theirs = third(lambda: oracle.dense_moe(x, leaves["w_in"], leaves["w_out"], *routing))
    torch.testing.assert_close(ours, theirs)


@st.composite
def sizes(draw):
    num_experts = draw(st.integers(1, 7))
    return {
        "tokens": draw(st.integers(0, 12)),
        "dim": draw(st.integers(1, 9)),
        "hidden": draw(st.integers(1, 9)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "act": draw(st.sampled_from(list(ACTIVATIONS))),
        "bias": draw(st.booleans()),
        "drop": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@given(sizes())
def test_values_and_gradients_equal_the_definition(case):
    torch.manual_seed(case["seed"])
    num_experts, act = case["num_experts"], case["act"]
    leaves = oracle.layer(
        case["tokens"],
        case["dim"],
        case["hidden"],
        num_experts,
        gated=ACTIVATIONS[act].gated,
        bias=case["bias"],
    )
    gates, experts = topk_route(
        torch.randn(case["tokens"], num_experts, dtype=torch.float64), case["top_k"]
    )
    if case["drop"]:
        dropped = torch.rand(experts.shape) < 0.3
        gates, experts = gates.masked_fill(dropped, 0), experts.masked_fill(dropped, num_experts)
    gates = gates.detach().requires_grad_()
    y = run(leaves, Routing(gates, experts), act)
    expected = oracle.dense_moe(
        leaves["x"],
        leaves["w_in"],
        leaves["w_out"],
        gates,
        experts,
        leaves.get("b_in"),
        leaves.get("b_out"),
        act,
    )
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    inputs = [gates, *leaves.values()]
    kept = (experts < num_experts).to(gates.dtype)
    ours, theirs = (
        list(torch.autograd.grad(out, inputs, dy, allow_unused=True)) for out in (y, expected)
    )
    theirs[0] = theirs[0] * kept  # a dropped choice is no input of the layer
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "case",
    ["one expert takes all", "half of the experts empty", "K = E", "K = 1", "T = 1", "T = 0"],
)
def test_odd_routings(case):
    tokens = {"T = 1": 1, "T = 0": 0}.get(case, 6)
    top_k = {"K = E": 4, "K = 1": 1}.get(case, 2)
    logits = torch.randn(tokens, 4, dtype=torch.float64)
    if case == "one expert takes all":
        top_k = 1
        logits[:, 2] = 50
    if case == "half of the experts empty":
        logits[:, :2] = -50
    leaves = oracle.layer(tokens, 3, 5, 4)
    routing = topk_route(logits, top_k)
    expected = oracle.dense_moe(
        leaves["x"], leaves["w_in"], leaves["w_out"], *routing, leaves["b_in"], leaves["b_out"]
    )
    y = run(leaves, routing)
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        torch.autograd.grad(y.sum(), leaves.values()),
        torch.autograd.grad(expected.sum(), leaves.values()),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("act", "size"),  # small; oneDNN; its longest
    [
        ("gelu", (96, 33, 70, 5)),
        ("swiglu", (96, 33, 70, 5)),
        ("swiglu", (300, 320, 768, 2)),
        ("gelu", (128, 1024, 500, 2)),
    ],
)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, act, size):
    tokens, dim, hidden, num_experts = size
    exact = oracle.layer(tokens, dim, hidden, num_experts, gated=ACTIVATIONS[act].gated)
    low = {k: v.detach().to(dtype).requires_grad_() for k, v in exact.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    gates, experts = topk_route(torch.randn(tokens, num_experts), 2)
    wide = Routing(gates.double(), experts)

    def plain(leaves, gates):
        """What one writes with torch alone: a loop over experts in the dtype of x."""
        y = torch.zeros_like(leaves["x"])
        for e in range(num_experts):
            token, slot = (experts == e).nonzero(as_tuple=True)
            hidden = leaves["x"][token] @ leaves["w_in"][e].t() + leaves["b_in"][e]
            rows = oracle_activation(act, hidden) @ leaves["w_out"][e].t() + leaves["b_out"][e]
            y = y.index_add(0, token, (rows * gates[token, slot, None]).to(y.dtype))
        return y

    outputs = {
        "exact": run(exact, wide, act),
        "ours": run(low, Routing(gates, experts), act),
        "plain": plain(low, gates),
    }
    dy = torch.randn_like(outputs["exact"])
    results = {}
    for name, y in outputs.items():
        leaves = exact if name == "exact" else low
        wanted = [leaves[k] for k in ("x", "w_in", "w_out", "b_in", "b_out")]
        results[name] = [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]
    for i, reference in enumerate(results["exact"]):
        ours, theirs = (results[k][i].double() - reference for k in ("ours", "plain"))
        assert ours.abs().max() <= 2 * theirs.abs().max(), f"output {i}"
        assert ours.square().mean() <= 4 * theirs.square().mean(), f"output {i}"


def oracle_activation(name, hidden):
    functions = torch.nn.functional
    if name == "swiglu":
        gate, up = hidden.chunk(2, -1)
        return functions.silu(gate) * up
    return functions.gelu(hidden)


def test_inputs_of_any_layout():
    """Transposed weights, expanded gradients (from .sum()), sliced tokens."""
    leaves = oracle.layer(6, 4, 5, 3)
    routing = topk_route(torch.randn(6, 3, dtype=torch.float64), 2)
    y = run(leaves, routing)
    odd = {
        "x": torch.stack(
            [leaves["x"].detach(), torch.full((6, 4), float("nan"), dtype=torch.float64)], -1
        )[..., 0],
        "w_in": leaves["w_in"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "w_out": leaves["w_out"].detach().transpose(0, 2).contiguous().transpose(0, 2),
        "b_in": leaves["b_in"].detach().t().contiguous().t(),
        "b_out": leaves["b_out"].detach()[0].expand(3, 4),
    }
    odd = {k: v.requires_grad_() for k, v in odd.items()}
    assert not any(odd[k].is_contiguous() for k in odd)
    straight = {k: v.detach().contiguous().requires_grad_() for k, v in odd.items()}
    odd_y, straight_y = run(odd, routing), run(straight, routing)
    torch.testing.assert_close(odd_y, straight_y)
    for got, want in zip(
        torch.autograd.grad(odd_y.sum(), odd.values()),
        torch.autograd.grad(straight_y.sum(), straight.values()),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    assert y.shape == (6, 4)


def test_large_products_with_strided_weights_stay_fast_and_right():
    """oneDNN has a very slow loop for odd strides; such weights must not reach it."""
    base = torch.randn(1, 512, 2 * 256)
    w_in, w_out = base[:, :, ::2], torch.randn(1, 256, 512)
    x = torch.randn(600, 256)
    routing = Routing(torch.ones(600, 1), torch.zeros(600, 1, dtype=torch.int32))
    torch.testing.assert_close(
        expert_mlp(x, w_in, w_out, routing),
        expert_mlp(x, w_in.contiguous(), w_out, routing),
        rtol=1e-4,
        atol=2e-3,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_tiles_an_expert_change_nothing(dtype, monkeypatch):
    """Two thousand rows in tiles of eight: sums over tiles must not lose what one product would
    keep."""
    leaves = oracle.layer(2000, 6, 7, 2, dtype=dtype)
    routing = topk_route(torch.randn(2000, 2), 2)
    dy = torch.randn(2000, 6).to(dtype)

    def gradients():
        return torch.autograd.grad(run(leaves, routing), leaves.values(), dy)

    whole = gradients()
    module = sys.modules["ironmoe.kernels.tiles"]
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    monkeypatch.setattr(module, "MIN_TILE_ROWS", 8)
    for got, want in zip(gradients(), whole, strict=True):
        limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert (got.double() - want.double()).norm() <= limit * want.double().norm()


def test_no_uninitialised_memory_is_read():
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        leaves = oracle.layer(7, 3, 4, 5, dtype=torch.float32)
        gates, experts = topk_route(torch.randn(7, 5), 2)
        experts = experts.clone()
        experts[2] = 5
        y = run(leaves, Routing(gates, experts))
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves.values()))
        assert y.isfinite().all() and (y[2] == 0).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_runs_are_bitwise_repeatable_and_a_given_dispatch_changes_nothing():
    leaves = oracle.layer(50, 16, 24, 4, dtype=torch.float32)
    routing = topk_route(torch.randn(50, 4), 2)
    first = run(leaves, routing)
    assert all(torch.equal(first, run(leaves, routing)) for _ in range(5))
    given_plan = expert_mlp(
        leaves["x"], leaves["w_in"], leaves["w_out"], routing,
        b_in=leaves["b_in"], b_out=leaves["b_out"], dispatch=plan_dispatch(routing.experts, 4),
    )  # fmt: skip
    assert torch.equal(first, given_plan)


def test_autocast_casts_the_layer_and_not_the_gates():
    leaves = oracle.layer(9, 8, 8, 3, dtype=torch.float32)
    routing = topk_route(torch.randn(9, 3), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(leaves, routing)
    assert y.dtype == torch.bfloat16
    cast = {k: v.bfloat16() for k, v in leaves.items()}
    assert torch.equal(y, run(cast, routing))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of"),
        ({"x": torch.zeros(4)}, "x must be a float matrix"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x must be a float matrix"),
        ({"w_in": torch.zeros(2, 5, 4)}, "w_in must have shape"),
        ({"w_out": torch.zeros(2, 3, 6)}, "w_out must have shape"),
        ({"w_out": torch.zeros(2, 3, 5, dtype=torch.float64)}, "w_out must be torch.float32"),
        ({"w_in": torch.zeros(2, 5, 3, dtype=torch.float64)}, "w_in must be torch.float32"),
        ({"b_in": torch.zeros(2, 4)}, "b_in must have shape"),
        ({"b_out": torch.zeros(2, 4)}, "b_out must be"),
        ({"activation": "swiglu"}, "even number of rows"),
        (
            {"routing": Routing(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32))},
            "routing must hold",
        ),
        (
            {"routing": Routing(torch.zeros(4, 2), torch.full((4, 2), 7, dtype=torch.int32))},
            "experts must lie in",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.zeros(4, 3),
        "w_in": torch.zeros(2, 5, 3),
        "w_out": torch.zeros(2, 3, 5),
        "routing": Routing(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int32)),
    } | change
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments)
