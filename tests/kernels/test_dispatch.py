import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ironmoe.kernels import Routing, combine, plan_dispatch


@st.composite
def choices(draw):
    """(experts (T, K), E), sentinels included."""
    num_experts, tokens, top_k = (
        draw(st.integers(1, 12)),
        draw(st.integers(0, 20)),
        draw(st.integers(1, 4)),
    )
    flat = draw(
        st.lists(st.integers(0, num_experts), min_size=tokens * top_k, max_size=tokens * top_k)
    )
    return torch.tensor(flat, dtype=torch.int32).view(tokens, top_k), num_experts


@given(choices())
def test_every_kept_choice_has_exactly_one_row(case):
    experts, num_experts = case
    plan = plan_dispatch(experts, num_experts)
    kept = experts < num_experts
    assert plan.offsets.shape == (num_experts + 1,)
    assert int(plan.offsets[0]) == 0
    assert int(plan.offsets[-1]) == int(kept.sum())
    assert plan.offsets.diff().tolist() == [int((experts == e).sum()) for e in range(num_experts)]
    assert sorted(plan.slot_row[kept].tolist()) == list(range(int(kept.sum())))
    assert (plan.slot_row[~kept] == -1).all()
    for t in range(experts.shape[0]):
        for k in range(experts.shape[1]):
            if kept[t, k]:
                row = int(plan.slot_row[t, k])
                assert (int(plan.row_token[row]), int(plan.row_slot[row])) == (t, k)
                assert plan.offsets[experts[t, k]] <= row < plan.offsets[experts[t, k] + 1]


@given(choices())
def test_rows_of_an_expert_are_in_token_order(case):
    experts, num_experts = case
    plan = plan_dispatch(experts, num_experts)
    position = plan.row_token.long() * experts.shape[1] + plan.row_slot
    for start, stop in zip(plan.offsets[:-1].tolist(), plan.offsets[1:].tolist(), strict=True):
        assert (position[start:stop].diff() > 0).all()


@given(choices())
def test_combine_leaves_dropped_choices_out(case):
    experts, num_experts = case
    plan = plan_dispatch(experts, num_experts)
    gates = torch.rand(experts.shape, dtype=torch.float64)
    rows = torch.randn(experts.numel(), 3, dtype=torch.float64)
    rows[int(plan.offsets[-1]) :] = float("nan")  # nobody may read these
    expected = torch.zeros(len(experts), 3, dtype=torch.float64)
    for t in range(experts.shape[0]):
        for k in range(experts.shape[1]):
            if experts[t, k] < num_experts:
                expected[t] += gates[t, k] * rows[plan.slot_row[t, k]]
    torch.testing.assert_close(combine(rows, Routing(gates, experts), plan), expected)


@pytest.mark.parametrize("dropped", [False, True])
def test_combine_gradients_of_both_orders(dropped):
    experts = torch.tensor([[0, 1], [2, 3 if dropped else 0], [1, 2]], dtype=torch.int32)
    plan = plan_dispatch(experts, 3)
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def run(rows, gates):
        return combine(rows, Routing(gates, experts), plan)

    assert torch.autograd.gradcheck(run, (rows, gates))
    assert torch.autograd.gradgradcheck(run, (rows, gates))


def test_combine_bfloat16_accumulates_in_float32():
    plan = plan_dispatch(torch.zeros(1, 300, dtype=torch.int32), 1)
    rows = torch.ones(300, 1, dtype=torch.bfloat16)
    # In bfloat16 the sum would stick at 256.
    assert combine(rows, Routing(torch.ones(1, 300), torch.zeros(1, 300)), plan).item() == 300


@pytest.mark.parametrize(
    ("experts", "num_experts", "message"),
    [
        (torch.zeros(2, 2), 3, "integer tensor"),
        (torch.zeros(4, dtype=torch.int32), 3, "integer tensor"),
        (torch.tensor([[0, 4]]), 3, "must lie in 0 … 3"),
        (torch.tensor([[-1, 0]]), 3, "must lie in 0 … 3"),
        (torch.zeros(2, 2, dtype=torch.int32), 0, "num_experts must be at least 1"),
    ],
)
def test_bad_input_is_named(experts, num_experts, message):
    with pytest.raises(ValueError, match=message):
        plan_dispatch(experts, num_experts)


def test_combine_names_what_does_not_fit():
    plan = plan_dispatch(torch.zeros(2, 2, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="rows must be"):
        combine(torch.zeros(3, 2), Routing(torch.zeros(2, 2), torch.zeros(2, 2)), plan)
    with pytest.raises(ValueError, match=r"routing.gates must have"):
        combine(torch.zeros(4, 2), Routing(torch.zeros(2, 1), torch.zeros(2, 1)), plan)
