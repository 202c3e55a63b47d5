"""Gather-and-sum over a token's choices, and its backward: numbers. What is compared is computed on
poisoned memory."""

import contract
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ironmoe.kernels import Routing, combine, plan_dispatch
from ironmoe.kernels.gpu import combine as gpu

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:triton.runtime.interpreter")
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
NAMES = ("y", "d_rows", "d_gates")


def one_by_one(rows, gates, slot_row, dtype):
    """The choices of each token in turn, in ``dtype``. On the CPU."""
    rows, gates = (t.detach().cpu().to(dtype).requires_grad_() for t in (rows, gates))
    y = torch.zeros(len(gates), rows.shape[1], dtype=dtype)
    for slot in range(gates.shape[1]):
        row = slot_row[:, slot : slot + 1].cpu().long()
        y = y + torch.where(
            row >= 0, gates[:, slot : slot + 1] * rows[row.clamp_min(0).squeeze(1)], 0
        )
    return y, rows, gates


def by_kernels(rows, routing, plan, dy):
    rows, gates = rows.detach().requires_grad_(), routing.gates.detach().requires_grad_()
    with contract.poisoned():
        y = combine(rows, Routing(gates, routing.experts), plan)
        return y, *torch.autograd.grad(y, (rows, gates), dy)


def inputs(device, tokens, num_experts, top_k, dim, dtype=torch.float32, drop=0.0):
    """(rows, routing, plan, dy)"""
    routing = Routing(*(t.to(device) for t in contract.choose(tokens, num_experts, top_k, drop)))
    rows, dy = (torch.randn(n, dim).to(device, dtype) for n in (tokens * top_k, tokens))
    return rows, routing, plan_dispatch(routing.experts, num_experts), dy


def check(rows, routing, plan, dy, lay=lambda t: t, slack=2.0):
    """Against float64, with NaN where nobody may read: in the rows and the gates of dropped
    choices."""
    results = []
    for dtype in (torch.float64, rows.dtype):
        y, own_rows, own_gates = one_by_one(rows, routing.gates, plan.slot_row, dtype)
        results.append((y, *torch.autograd.grad(y, (own_rows, own_gates), dy.cpu().to(dtype))))
    kept, dropped = int(plan.offsets[-1]), plan.slot_row < 0
    rows = rows.index_fill(0, torch.arange(kept, len(rows), device=rows.device), float("nan"))
    got = by_kernels(
        lay(rows),
        Routing(routing.gates.masked_fill(dropped, float("nan")), routing.experts),
        plan,
        lay(dy),
    )
    for name, ours, exact, plain in zip(NAMES, got, *results, strict=True):
        plain = plain.float() if name == "d_gates" else plain
        contract.assert_accurate(ours, plain, exact, name, slack)
    assert (got[1][kept:] == 0).all() and (got[2][dropped] == 0).all()


@pytest.mark.parametrize("dtype", contract.DTYPES)
@pytest.mark.parametrize("dim", [8, 16, 24, 31, 32, 48, 64, 96, 1500])
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, dim):
    check(*inputs(device, 30, 6, 4, dim, dtype, drop=0.2), slack=0.5)


@st.composite
def sizes(draw):
    num_experts = draw(st.integers(1, 12))
    shape = (
        draw(st.integers(0, 70)),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.integers(1, 40)),
    )
    return (
        *shape,
        draw(st.sampled_from([torch.float32, torch.float16])),
        draw(st.sampled_from([0.0, 0.4, 1.0])),
    )


@quick
@given(sizes())
def test_any_shape(device, case):
    check(*inputs(device, *case), slack=4)


def test_choices_are_added_in_order_and_in_float32(device):
    """2²⁴ + 1 is 2²⁴ in float32, so the order shows; 2048 + 1 is 2048 in float16, so the
    accumulator shows."""
    experts = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]], dtype=torch.int32, device=device)
    plan = plan_dispatch(experts, 3)
    of_expert = torch.arange(3).repeat_interleave(3)
    big = torch.tensor([2.0**24, 1.0, -(2.0**24)], device=device)[of_expert].unsqueeze(1)
    routing = Routing(torch.ones(3, 3, device=device), experts)
    assert combine(big, routing, plan).flatten().tolist() == [0.0, 1.0, 0.0]
    half = torch.tensor([2048.0, 1.0, 1.0], device=device).half()[of_expert].unsqueeze(1)
    assert combine(half, routing, plan).flatten().tolist() == [2050.0] * 3


@pytest.mark.parametrize(
    "lay",
    [
        contract.among_nan,
        lambda t: contract.among_nan(t, margin=3),
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    ],
    ids=["among NaN", "among NaN, not aligned", "transposed", "every other column"],
)
def test_rows_and_dy_of_any_layout(device, lay):
    check(*inputs(device, 20, 5, 3, 24, drop=0.3), lay=lay)


@pytest.mark.parametrize("shape", [(1, 24), (20, 1), (1, 1)])
def test_dy_with_zero_strides(device, shape):
    rows, routing, plan, _ = inputs(device, 20, 5, 3, 24, drop=0.3)
    check(rows, routing, plan, torch.randn(shape, device=device).expand(20, 24))


def test_without_gates_it_is_the_plain_sum(device):
    rows, routing, plan, _ = inputs(device, 20, 5, 3, 24, drop=0.3)
    with contract.poisoned():
        got = gpu.combine(rows, None, plan.slot_row)
    assert torch.equal(got, gpu.combine(rows, torch.ones_like(routing.gates), plan.slot_row))


@pytest.mark.parametrize(
    ("want_rows", "want_gates"), [(True, False), (False, True), (False, False)]
)
def test_each_gradient_alone(device, want_rows, want_gates):
    rows, routing, plan, dy = inputs(device, 20, 5, 3, 24, drop=0.3)
    both = gpu.combine_backward(dy, rows, routing.gates, *plan[1:], want_rows=True, want_gates=True)
    alone = gpu.combine_backward(
        dy, rows, routing.gates, *plan[1:], want_rows=want_rows, want_gates=want_gates
    )
    for got, expected, wanted in zip(alone, both, (want_rows, want_gates), strict=True):
        assert torch.equal(got, expected) if wanted else got is None


def test_a_token_does_not_depend_on_the_others_and_runs_repeat(device):
    rows, routing, plan, dy = inputs(device, 70, 5, 3, 24, drop=0.3)
    whole, again = by_kernels(rows, routing, plan, dy), by_kernels(rows, routing, plan, dy)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    chosen = torch.randperm(70, device=device)[:33]
    part = Routing(routing.gates[chosen], routing.experts[chosen])
    own_plan = plan_dispatch(part.experts, 5)
    own_rows = torch.zeros(33 * 3, 24, device=device)
    kept = own_plan.slot_row >= 0
    own_rows[own_plan.slot_row[kept]] = rows[plan.slot_row[chosen][kept]]
    y, d_rows, d_gates = by_kernels(own_rows, part, own_plan, dy[chosen])
    assert torch.equal(y, whole[0][chosen]) and torch.equal(d_gates, whole[2][chosen])
    assert torch.equal(d_rows[own_plan.slot_row[kept]], whole[1][plan.slot_row[chosen][kept]])
