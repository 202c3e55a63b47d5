"""Numbers of the expert on Triton kernels: y and every gradient against float64. What is compared
is computed on poisoned memory."""

import contract
import inexact
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ironmoe.kernels import ACTIVATIONS, Routing

# The interpreter's numpy: exp of large numbers, and an index of one element.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:RuntimeWarning", "ignore:.*:DeprecationWarning:triton.runtime.interpreter"
)
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
INTERLEAVED = "clamped_swiglu_interleaved"
KINKS = {
    "relu": [0.0],
    "relu2": [0.0],
    "clamped_swiglu": [7.0, -7.0],
    INTERLEAVED: [7.0, -7.0],
    "limited_swiglu": [10.0, -10.0],
}
WITHOUT_BIAS = ("relu", "clamped_swiglu", "limited_swiglu", INTERLEAVED)


def layer(tokens, dim, hidden, num_experts, dtype=torch.float32, act="relu", bias=True):
    leaves = contract.oracle.layer(
        tokens, dim, hidden, num_experts, dtype, ACTIVATIONS[act].gated, bias
    )
    return {name: leaf.detach() for name, leaf in leaves.items()}


def results(device, leaves, routing, act="relu", dy=None):
    """As the kernels give them, with no word on what is right."""
    leaves = {name: leaf.to(device).requires_grad_() for name, leaf in leaves.items()}
    gates, experts = (t.to(device) for t in routing)
    dy = torch.ones_like(leaves["x"]) if dy is None else dy.to(device)
    return contract.mlp_results(leaves, gates.requires_grad_(), experts, act, dy)


@pytest.mark.parametrize(
    ("act", "bias"),
    [*((act, True) for act in ACTIVATIONS), *((act, False) for act in WITHOUT_BIAS)],
)
@pytest.mark.parametrize(("dtype", "precision"), contract.SETTINGS)
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, precision, act, bias):
    """Sizes that fill no block, a quarter of the choices dropped, units large enough to be cut."""
    leaves = layer(24, 33, 41, 3, dtype, act, bias)
    leaves["x"] *= 4 if act == "limited_swiglu" else 3
    contract.check_mlp(
        device, leaves, contract.choose(24, 3, 2, drop=0.25), act, precision, slack=0.5
    )


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_unit_and_slope_from_minus_40_to_40_and_at_the_kinks(device, act):
    """One expert that is the identity: H is x, so y is the unit and dX its slope."""
    gated = ACTIVATIONS[act].gated
    h = torch.cat(
        [torch.linspace(-40, 40, 13 if gated else 161), torch.tensor(KINKS.get(act, [0.0]))]
    )
    hidden = torch.cartesian_prod(h, h) if gated else h.view(-1, 1)
    wide = hidden.shape[1]
    leaves = {
        "x": torch.nn.functional.pad(hidden, (0, 4 - wide)),
        "w_in": torch.eye(wide, 4)[None],
        "w_out": torch.eye(4, 1)[None],
    }
    got = results(
        device,
        leaves,
        Routing(torch.ones(len(hidden), 1), torch.zeros(len(hidden), 1, dtype=torch.int32)),
        act,
    )
    hidden = hidden.double()
    exact = (
        ACTIVATIONS[act].value(hidden),
        ACTIVATIONS[act].backward(torch.ones(len(hidden), 1).double(), hidden),
    )
    # A GPU computes a sigmoid from an exponential and a quotient, each up to 2^-22 off
    # (``inexact``).
    allowed = 5e-7 * hidden.abs().clamp_min(1).prod(1, keepdim=True)
    for ours, unit_or_slope in zip((got["y"][:, :1], got["x"][:, :wide]), exact, strict=True):
        error = (ours.cpu().double() - unit_or_slope).abs()
        assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own arithmetic")
@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_bounds_do_not_suppose_exact_arithmetic(device, act, direction):
    with inexact.inexact(direction):
        test_unit_and_slope_from_minus_40_to_40_and_at_the_kinks(device, act)


ODD = {  # tokens, D, F, E, K, drop
    "no tokens": (0, 5, 6, 3, 2, 0.0),
    "one token": (1, 5, 6, 3, 2, 0.0),
    "K = 1": (9, 5, 6, 3, 1, 0.0),
    "K = E": (9, 5, 6, 3, 3, 0.0),
    "all of size 1": (1, 1, 1, 1, 1, 0.0),
    "all dropped": (6, 5, 6, 3, 2, 1.0),
    "most experts empty": (3, 5, 6, 40, 1, 0.3),
    "one expert, many tiles, several blocks of every axis": (300, 70, 136, 1, 1, 0.1),
    "more tiles than a group, several blocks": (70, 35, 67, 10, 2, 0.1),
    "multiples of every block": (128, 64, 128, 2, 1, 0.0),
}


@pytest.mark.parametrize("act", ["swiglu", INTERLEAVED])
@pytest.mark.parametrize("case", ODD)
def test_odd_sizes(device, case, act):
    tokens, dim, hidden, num_experts, top_k, drop = ODD[case]
    leaves = layer(tokens, dim, hidden, num_experts, act=act)
    contract.check_mlp(device, leaves, contract.choose(tokens, num_experts, top_k, drop), act)


@pytest.mark.parametrize("taken", [0, 2, 3])
def test_one_expert_takes_all(device, taken):
    routing = Routing(torch.rand(40, 1), torch.full((40, 1), taken, dtype=torch.int32))
    got = contract.check_mlp(device, layer(40, 12, 20, 4), routing, "relu")
    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert (got[name].abs().flatten(1).sum(1) > 0).tolist() == [e == taken for e in range(4)]


@st.composite
def small_integers(draw):
    """(leaves, routing): no sum leaves what float16 holds exactly, so nothing rounds."""
    num_experts = draw(st.integers(1, 9))
    tokens, dim, hidden = (
        draw(st.integers(0, 20)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 40)),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    leaves = layer(tokens, dim, hidden, num_experts, bias=draw(st.booleans()))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    leaves = {name: torch.randint(-1, 2, leaf.shape).to(dtype) for name, leaf in leaves.items()}
    gates, experts = contract.choose(
        tokens, num_experts, draw(st.integers(1, num_experts)), draw(st.sampled_from([0.0, 0.5]))
    )
    return leaves, Routing((2 * gates).ceil() / 2, experts)


@quick
@given(small_integers())
def test_any_shape_is_exact_in_small_integers(device, case):
    leaves, routing = case
    dy = torch.randint(-1, 2, leaves["x"].shape)
    exact = contract.exact_mlp(leaves, routing, "relu2", dy)
    for name, got in results(device, leaves, routing, "relu2", dy.to(leaves["x"].dtype)).items():
        assert torch.equal(got.cpu().double(), exact[name]), name


@pytest.mark.parametrize(
    ("chip", "dtype", "act"),
    [
        ("sm_80", torch.float32, "swiglu"),
        ("sm_80", torch.float32, INTERLEAVED),
        *(
            (chip, torch.float16, act)
            for chip in ("sm_80", "sm_90", "sm_100", "sm_120")
            for act in ("relu", "swiglu", INTERLEAVED)
        ),
    ],
)
def test_widest_configurations_of_every_chip(device, chip, dtype, act):
    """With and without the copy engine, the epilogue in 1 to 8 parts; whole blocks, and the rest of
    one."""
    leaves = layer(66, 72, 136, 2, dtype, act)
    with contract.chip_or_skip(chip, leaves["x"].to(device)):
        contract.check_mlp(device, leaves, contract.choose(66, 2, 2, drop=0.02), act)


def transposed(tensor):
    return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)


LAYOUTS = {
    "among NaN": contract.among_nan,
    "among NaN, not aligned": lambda t: contract.among_nan(t, margin=3),
    "transposed": transposed,
    "transposed among NaN": lambda t: contract.among_nan(t.transpose(-2, -1)).transpose(-2, -1),
    "every other column": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "first axis last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize(
    ("dtype", "act"),
    [(torch.float32, "swiglu"), (torch.float16, "relu"), (torch.float16, INTERLEAVED)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(device, layout, act, dtype):
    """x, weights, biases and dy as views. NaN around them must not be read, not even to be
    multiplied by 0."""

    def lay(name, tensor):
        laid = LAYOUTS[layout](tensor)
        assert torch.equal(laid, tensor) and not laid.is_contiguous()
        return laid

    contract.check_mlp(
        device, layer(20, 24, 40, 3, dtype, act), contract.choose(20, 3, 2, 0.2), act, lay=lay
    )


@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_zero_strides(device, axis):
    """dy of a sum or a mean is one number, expanded; experts may share one matrix."""

    def lay(name, tensor):
        for a in (axis,) if isinstance(axis, int) else axis:
            tensor = tensor.narrow(a, 0, 1).expand_as(tensor)
        return tensor

    leaves = {name: lay(name, leaf) for name, leaf in layer(20, 12, 24, 3).items()}
    dy = lay("dy", torch.randn(20, 12))
    contract.check_mlp(device, leaves, contract.choose(20, 3, 2), "relu", dy=dy, lay=lay)


def test_gate_gradient_does_not_depend_on_the_gates(device):
    """Taken before gating, so that a gate of 0 has the right one: not 0, and no quotient of
    zeros."""
    leaves, (gates, experts) = layer(20, 12, 24, 3, act="swiglu"), contract.choose(20, 3, 2)
    dy = torch.randn(20, 12)
    some = gates.masked_fill(torch.rand(20, 2) < 0.5, 0)
    reference = results(device, leaves, Routing(gates, experts), "swiglu", dy)
    assert (reference["gates"] != 0).all()
    for other in (some, torch.zeros(20, 2), -gates):
        got = contract.check_mlp(device, leaves, Routing(other, experts), "swiglu", dy=dy)
        assert torch.equal(got["gates"], reference["gates"])
    got = results(device, leaves, Routing(torch.zeros(20, 2), experts), "swiglu", dy)
    assert all((grad == 0).all() for name, grad in got.items() if name != "gates")


def test_dropped_choices_give_nothing_and_their_gates_are_not_read(device):
    leaves, (gates, experts) = layer(20, 12, 24, 3), contract.choose(20, 3, 2, drop=0.4)
    dropped = experts == 3
    expected = results(device, leaves, Routing(gates, experts))
    got = results(device, leaves, Routing(gates.masked_fill(dropped, float("nan")), experts))
    assert all(torch.equal(got[name], expected[name]) for name in got)
    nowhere = dropped.all(1)
    assert nowhere.any() and (got["gates"].cpu()[dropped] == 0).all()
    assert (got["y"].cpu()[nowhere] == 0).all() and (got["x"].cpu()[nowhere] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_does_not_depend_on_the_others(device, dtype, monkeypatch):
    """Its y, dX and gate gradient keep their bits in another order and in a smaller batch: the
    blocks are the same."""
    monkeypatch.setattr("numpy.matmul", contract.dot_row_by_row)
    leaves, (gates, experts) = (
        layer(64, 36, 70, 3, dtype, "swiglu"),
        contract.choose(64, 3, 2, drop=0.1),
    )
    dy = torch.randn(64, 36).to(dtype)
    whole = results(device, leaves, Routing(gates, experts), "swiglu", dy)
    for chosen in (torch.randperm(64), torch.randperm(64)[:50]):
        fewer = leaves | {"x": leaves["x"][chosen]}
        part = results(device, fewer, Routing(gates[chosen], experts[chosen]), "swiglu", dy[chosen])
        assert all(
            torch.equal(part[name].cpu(), whole[name].cpu()[chosen]) for name in ("y", "x", "gates")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_runs_repeat_their_bits_and_frozen_weights_change_none(device, dtype):
    leaves, routing = layer(50, 12, 40, 4, dtype, "swiglu"), contract.choose(50, 4, 2, 0.1)
    first, second = (results(device, leaves, routing, "swiglu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = leaves["x"].to(device).requires_grad_()
    rest = {name: leaves[name].to(device) for name in ("w_in", "w_out", "b_in", "b_out")}
    y = contract.expert_mlp(
        x, routing=Routing(*(t.to(device) for t in routing)), activation="swiglu", **rest
    )
    assert torch.equal(y, first["y"])
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first["x"])


@pytest.mark.parametrize(("act", "hidden"), [("relu", 40), ("swiglu", 36), (INTERLEAVED, 36)])
def test_programs_may_run_in_any_order(device, act, hidden):
    """No program writes what another one owns, whole tiles by the copy engine included."""
    leaves, routing = layer(40, 24, hidden, 4, torch.float16, act), contract.choose(40, 4, 2, 0.2)
    forward = results(device, leaves, routing, act)
    with contract.programs_in_reverse():
        backward = results(device, leaves, routing, act)
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_with_its_token(device, act):
    leaves, routing = layer(6, 4, 5, 2, act=act), contract.choose(6, 2, 1)
    leaves["x"][2] = float("nan")
    y = results(device, leaves, routing, act)["y"].isnan()
    assert y.all(1).tolist() == y.any(1).tolist() == [t == 2 for t in range(6)]
