"""Ragged rows times stacked matrices: numbers. What is compared is computed on poisoned memory."""

from functools import partial
from itertools import pairwise

import contract
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ironmoe.kernels import ACTIVATIONS, grouped_matmul, plan_dispatch
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.kernels.gpu import grouped_matmul as gpu

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:triton.runtime.interpreter")
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)


def loop(x, weight, offsets, bias):
    """One expert after the other; 0 for the rows of none."""
    rows = [
        torch.nn.functional.linear(x[start:stop], weight[e], None if bias is None else bias[e])
        for e, (start, stop) in enumerate(pairwise(offsets))
    ]
    return torch.cat(
        [*rows, torch.zeros(len(x) - offsets[-1], weight.shape[1], dtype=x.dtype, device=x.device)]
    )


def inputs(counts, dim, out, dtype=torch.float32, surplus=2, bias=True):
    """{x, weight, bias} on the CPU, and the offsets; ``surplus`` rows belong to no expert."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    tensors = {
        "x": torch.randn(sum(counts) + surplus, dim),
        "weight": torch.randn(len(counts), out, dim) * dim**-0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(len(counts), out)
    return {name: t.to(dtype) for name, t in tensors.items()}, offsets


def results(f, tensors, dy):
    """{y, and the gradient of each tensor}"""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = f(leaves["x"], leaves["weight"], leaves.get("bias"))
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True)
    )


def check(device, tensors, offsets, precision="ieee", lay=lambda t: t, slack=2.0, dy=None):
    """y and all gradients against float64. Rows of no expert are NaN for the kernels alone: nobody
    may read them."""
    tensors = {name: t.to(device) for name, t in tensors.items()}
    bounds = offsets.tolist()
    dy = (
        torch.randn(len(tensors["x"]), tensors["weight"].shape[1]).to(tensors["x"])
        if dy is None
        else dy.to(device)
    )
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    plain = results(lambda x, w, b: loop(x, w, bounds, b), tensors, dy)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = results(
        lambda x, w, b: loop(x, w, bounds, b),
        {n: t.cpu().double() for n, t in tensors.items()},
        dy.cpu().double(),
    )
    unread = torch.arange(bounds[-1], len(tensors["x"]), device=device)
    ours = {
        name: lay(t)
        for name, t in (tensors | {"x": tensors["x"].index_fill(0, unread, float("nan"))}).items()
    }
    with contract.poisoned():
        got = results(
            lambda x, w, b: grouped_matmul(x, w, offsets.to(device), bias=b, precision=precision),
            ours,
            lay(dy),
        )
    for name in exact:
        contract.assert_accurate(got[name], plain[name], exact[name], name, slack)
    assert (got["y"][bounds[-1] :] == 0).all() and (got["x"][bounds[-1] :] == 0).all()
    return got


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "precision"), contract.SETTINGS)
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, precision, bias):
    tensors, offsets = inputs([30, 0, 1, 45], 50, 70, dtype, bias=bias)
    check(device, tensors, offsets, precision, slack=0.5)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=5))
    return (
        counts,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 70)),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
    )


@quick
@given(cases(), st.sampled_from([torch.float32, torch.float16]))
def test_any_shape_is_exact_in_small_integers(device, case, dtype):
    counts, dim, out, bias, surplus = case
    tensors, offsets = inputs(counts, dim, out, dtype, surplus, bias)
    tensors = {name: torch.randint(-2, 3, t.shape).to(dtype) for name, t in tensors.items()}
    dy = torch.randint(-2, 3, (len(tensors["x"]), out)).to(dtype)
    got = check(device, tensors, offsets, dy=dy)
    exact = results(
        lambda x, w, b: loop(x, w, offsets.tolist(), b),
        {n: t.double() for n, t in tensors.items()},
        dy.double(),
    )
    assert all(torch.equal(got[name].cpu().double(), exact[name]) for name in exact)


@pytest.mark.parametrize(
    "lay",
    [
        contract.among_nan,
        lambda t: contract.among_nan(t, margin=3),
        lambda t: contract.among_nan(t.transpose(-2, -1)).transpose(-2, -1),
        lambda t: contract.among_nan(t.transpose(-2, -1), margin=3).transpose(-2, -1),
        lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    ],
    ids=[
        "among NaN",
        "not aligned",
        "transposed",
        "transposed, not aligned",
        "every other column",
        "first axis last",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_of_any_layout(device, lay, dtype):
    check(device, *inputs([5, 0, 20], 24, 40, dtype), lay=lay)


@pytest.mark.parametrize("shape", [(1, 40), (27, 1), (1, 1)])
def test_zero_strides(device, shape):
    tensors, offsets = inputs([5, 0, 20], 24, 40)
    tensors |= {
        "x": tensors["x"][:1].expand(27, 24),
        "weight": tensors["weight"][:1].expand(3, 40, 24),
    }
    check(device, tensors, offsets, dy=torch.randn(shape).expand(27, 40))


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 90, 0], [1], [0] * 30 + [1], [3] * 9])
@pytest.mark.parametrize("surplus", [0, 50])
def test_empty_experts_and_one_that_has_all(device, counts, surplus):
    check(device, *inputs(counts, 12, 20, surplus=surplus))


@pytest.mark.parametrize("act", ["relu", "swiglu", "clamped_swiglu_interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "change", [{}, {"persistent": True}, {"box": False}], ids=["as it is", "persistent", "no box"]
)
def test_gathered_rows_and_activation(device, monkeypatch, dtype, act, change):
    """H and the units, both and each alone. A persistent grid has fewer programs than tiles;
    without a box gate and up are two products."""
    choose_blocks = gpu.blocks_for
    monkeypatch.setattr(gpu, "blocks_for", lambda *key: choose_blocks(*key)._replace(**change))
    experts = contract.choose(60, 5, 2, drop=0.2).experts.to(device)
    plan = plan_dispatch(experts, 5)
    tensors, _ = inputs([0] * 5, 24, 70, dtype, surplus=60)
    x, weight, bias = (t.to(device) for t in tensors.values())
    tiles = plan_tiles(plan.offsets, 120, dtype)
    with contract.poisoned():
        run = partial(gpu.grouped_matmul, x, weight, bias, plan.offsets, tiles)
        gathers = {"row_token": plan.row_token, "precision": "ieee"}
        hidden, units = run(activation=act, **gathers)
        nothing, alone = run(activation=act, keep_hidden=False, **gathers)
        only_hidden, none = run(activation="none", **gathers)
    assert nothing is None and none is None and torch.equal(alone, units)
    kept = int(plan.offsets[-1])
    torch.testing.assert_close(only_hidden, hidden)
    rows = x[plan.row_token.long()]
    exact = loop(
        rows.cpu().double(), weight.cpu().double(), plan.offsets.tolist(), bias.cpu().double()
    )
    plain = loop(rows, weight, plan.offsets.tolist(), bias)
    contract.assert_accurate(hidden, plain, exact, "H")
    contract.assert_accurate(
        units, contract.plain_activation(act, plain), ACTIVATIONS[act].value(exact), "units"
    )
    assert (hidden[kept:] == 0).all() and (units[kept:] == 0).all()


def test_a_row_does_not_depend_on_the_others_and_runs_repeat(device, monkeypatch):
    monkeypatch.setattr("numpy.matmul", contract.dot_row_by_row)
    tensors, offsets = inputs([40, 0, 50], 24, 40, surplus=0)
    x, weight, bias = (t.to(device) for t in tensors.values())
    whole = grouped_matmul(x, weight, offsets.to(device), bias=bias)
    assert torch.equal(whole, grouped_matmul(x, weight, offsets.to(device), bias=bias))
    chosen = torch.cat([torch.randperm(40)[:33], torch.arange(40, 90)])
    fewer = torch.tensor([0, 33, 33, 83], dtype=torch.int32, device=device)
    assert torch.equal(
        grouped_matmul(x[chosen.to(device)], weight, fewer, bias=bias), whole[chosen.to(device)]
    )


def test_what_the_copy_engine_takes(device):
    """Rows at multiples of 16 bytes, a contiguous last axis, an aligned start; the interpreter
    would forgive a zero stride."""
    t = torch.zeros(4, 8, 16, device=device)
    for taken in (t, t[1:], t[:, 2:], t[..., :5], t[..., 4:], t.transpose(0, 1), t[..., :8].half()):
        assert gpu.takes_tma(taken)
    for left in (
        t[..., 1:],
        t.transpose(1, 2),
        t[:1].expand(4, 8, 16),
        t[..., ::2],
        t[:0],
        t.new_zeros(4, 8, 5),
    ):
        assert not gpu.takes_tma(left)
