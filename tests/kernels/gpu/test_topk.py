"""Routing: the choice exactly as the twin's, gates and gradients against float64. All on poisoned
memory."""

import contract
import inexact
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise

from ironmoe.kernels import ExpertGroups, topk_route
from ironmoe.kernels.gpu import topk as gpu
from ironmoe.kernels.gpu.launch import observe
from ironmoe.kernels.scores import SCORES
from ironmoe.kernels.types import GateRule

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own arithmetic")

# What the interpreter's numpy says of -inf - -inf, in rows that are padding.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

ORDERS = ["score_first", "topk_first"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# exp, division and log of a GPU are a few units in the last place off (``inexact``). Nothing
# cancels in the gates, so their relative error is the sum of a few such errors. In a gradient
# differences are taken of numbers up to the largest of d_gates, and so it errs by units in its last
# place.
GATES = 6e-6
UNITS = 4
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
DEFAULTS = {
    "score": "softmax",
    "order": "score_first",
    "renormalize": False,
    "selection_bias": None,
    "groups": None,
    "scale": 1.0,
}


@pytest.fixture(autouse=True)
def _poisoned():
    with contract.poisoned():
        yield


def route(logits, top_k, score, order, renormalize, selection_bias, groups, scale):
    rule = GateRule(score, order, renormalize, scale)
    return gpu.route(logits, top_k, rule, selection_bias, groups)


def route_backward(d_gates, logits, experts, score, order, renormalize, scale):
    rule = GateRule(score, order, renormalize, scale)
    return gpu.route_backward(d_gates, logits, experts, rule)


def twin(logits, top_k, **options):
    """The oracle. ``device`` has the public function interpret the very kernels under test, so it
    is called without."""
    with pytest.MonkeyPatch.context() as patch, observe() as launches:
        patch.delenv("TRITON_INTERPRET", raising=False)
        routing = topk_route(logits, top_k, **options)
    assert not launches
    return routing


def check_route(logits, top_k, device, **options):
    """Against the twin. Values must be well apart or equal, so that no rounding of a score can
    decide."""
    options = DEFAULTS | options
    want = twin(logits, top_k, **options)
    if options["selection_bias"] is not None:
        options["selection_bias"] = options["selection_bias"].to(device)
    gates, experts = route(logits.to(device), top_k, **options)
    assert gates.dtype == torch.float32 and experts.dtype == torch.int32
    assert experts.tolist() == want.experts.tolist()
    torch.testing.assert_close(gates.cpu(), want.gates.float(), rtol=GATES, atol=0, equal_nan=True)


def check_backward(logits, top_k, device, score, order, renormalize, scale=1.0):
    """The error against float64 is at most twice that of autograd through the float32 twin."""
    experts = twin(logits, top_k, score=score, order=order).experts
    d_gates = torch.randn(experts.shape)

    def by_autograd(dtype):
        leaf = logits.to(dtype).requires_grad_()
        gates, chosen = twin(
            leaf, top_k, score=score, order=order, renormalize=renormalize, scale=scale
        )
        assert torch.equal(chosen, experts)
        return torch.autograd.grad(gates, leaf, d_gates.to(gates.dtype))[0]

    exact, plain = by_autograd(torch.float64), by_autograd(torch.float32)
    got = route_backward(
        d_gates.to(device), logits.to(device), experts.to(device), score, order, renormalize, scale
    )
    assert got.dtype == logits.dtype and got.shape == logits.shape
    rounding = exact.abs() * torch.finfo(logits.dtype).eps
    unit = (
        UNITS * torch.finfo(torch.float32).eps * scale * d_gates.abs().max()
        if d_gates.numel()
        else 0.0
    )
    allowed = 2 * (plain - exact).abs().amax(-1, keepdim=True) + rounding + unit
    error = (got.cpu().double() - exact).abs()
    assert (error <= allowed).all(), (error - allowed).max()


@st.composite
def calls(draw):
    """Logits, K and options. A step of 1/4 from -4 to 4 is exact in all dtypes, and makes ties."""
    groups, tokens = None, draw(st.integers(0, 9))
    experts = draw(st.integers(1, 40))
    if draw(st.booleans()):
        num_groups = draw(st.integers(1, 7))
        experts = num_groups * draw(st.integers(1, 6))
        groups = ExpertGroups(
            num_groups, draw(st.integers(1, num_groups)), draw(st.sampled_from(["max", "top2_sum"]))
        )
    candidates = experts if groups is None else experts // groups.num_groups * groups.keep
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, bound = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 16]))
    logits = (torch.randint(-bound, bound + 1, (tokens, experts), generator=generator) / 4).to(
        dtype
    )
    bias = (
        torch.randint(-2, 3, (experts,), generator=generator) / 4 if draw(st.booleans()) else None
    )
    options = {
        "score": draw(st.sampled_from(list(SCORES))),
        "order": draw(st.sampled_from(ORDERS)),
        "renormalize": draw(st.booleans()),
        "selection_bias": None
        if bias is None
        else bias.to(draw(st.sampled_from([*DTYPES, torch.float64]))),
        "groups": groups,
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    return logits, draw(st.integers(1, min(candidates, 32))), options


@quick
@given(calls())
def test_route_is_the_twin(device, call):
    logits, top_k, options = call
    check_route(logits, top_k, device, **options)


@quick
@given(calls())
def test_backward_is_autograd_through_the_twin(device, call):
    logits, top_k, options = call
    check_backward(
        logits,
        top_k,
        device,
        *(options[name] for name in ("score", "order", "renormalize", "scale")),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "experts, top_k", [(1024, 32), (1000, 7), (160, 6), (32, 32), (5, 5), (1, 1)]
)
def test_sizes(device, experts, top_k, score, order):
    logits = torch.stack([torch.randperm(experts) for _ in range(3)]) / max(experts / 8, 1) - 4
    check_route(logits, top_k, device, score=score, order=order, renormalize=True)
    check_backward(logits, top_k, device, score, order, True)
    check_backward(logits, top_k, device, score, order, False, scale=2.5)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize(
    "experts, num_groups, keep, top_k",
    [(160, 8, 3, 6), (256, 8, 4, 8), (24, 24, 5, 5), (1023, 33, 20, 32)],
)
def test_groups(device, experts, num_groups, keep, top_k, group_score):
    logits = torch.stack([torch.randperm(experts) for _ in range(3)]) / (experts / 8) - 4
    check_route(
        logits, top_k, device, score="sigmoid", groups=ExpertGroups(num_groups, keep, group_score)
    )


def test_agrees_with_torch_topk_where_values_differ(device):
    logits = torch.stack([torch.randperm(97) for _ in range(40)]) / 16
    gates, experts = route(logits.to(device), 9, **DEFAULTS | {"order": "topk_first"})
    values, indices = logits.topk(9)
    assert experts.tolist() == indices.tolist()
    torch.testing.assert_close(gates.cpu(), values.softmax(-1), rtol=GATES, atol=0)


@pytest.mark.parametrize("groups", [None, ExpertGroups(4, 2, "max"), ExpertGroups(4, 2)])
def test_ties_go_to_the_lower_index(device, groups):
    logits = torch.tensor(
        [[0.0] * 12, [-0.0, 0.0] * 6, [0.0, -0.0] * 6, [1.0, 2.0, 2.0] * 4, [-float("inf")] * 12]
    )
    for order in ORDERS:
        check_route(logits, 6, device, order=order, groups=groups)
    equal_in_float32 = torch.tensor([[20.0, 19.0, 25.0, 18.5] * 3])  # the sigmoid is 1 for all
    check_route(equal_in_float32, 6, device, score="sigmoid", groups=groups)


@pytest.mark.parametrize("groups", [None, ExpertGroups(3, 1, "max"), ExpertGroups(3, 1)])
def test_infinite_logits(device, groups):
    inf = float("inf")
    logits = torch.tensor(
        [
            [-inf, 1.0, -inf, 0.0, -inf, -inf],
            [-inf, -inf, -inf, -inf, -inf, 3.0],
            [0.0, 1.0, 2.0, 3.0, 4.0, -inf],
        ]
    )
    for score in SCORES:
        check_route(logits, 2, device, score=score, order="score_first", groups=groups)
        check_route(logits, 2, device, score=score, order="topk_first", groups=groups)
    check_route(
        torch.tensor([[0.0, inf, -1.0, inf, 2.0, 1.0]]),
        2,
        device,
        score="sigmoid",
        order="topk_first",
        groups=groups,
    )


def test_nan_counts_as_the_largest(device):
    nan = float("nan")
    logits = torch.tensor(
        [[1.0, nan, float("inf"), nan, 2.0], [nan] * 5, [0.0, 1.0, 2.0, 3.0, -nan]], device=device
    )
    for order in ORDERS:
        _, experts = route(logits, 3, **DEFAULTS | {"order": order, "score": "sigmoid"})
        assert experts.tolist() == [[1, 3, 2], [0, 1, 2], [4, 3, 2]]
    _, experts = route(logits, 5, **DEFAULTS)  # one NaN makes the whole softmax NaN
    assert experts.tolist() == [[0, 1, 2, 3, 4]] * 3
    # the twin takes NaN in a bias: its logits alone are looked at
    bias = torch.tensor([0.0, 0.0, nan, 0.0, 0.0, nan])
    for groups in (None, ExpertGroups(3, 1), ExpertGroups(2, 1, "max")):
        check_route(torch.randn(3, 6), 2, device, selection_bias=bias, groups=groups)


@pytest.mark.parametrize("score", SCORES)
def test_far_logits_keep_their_precision(device, score):
    logits = torch.tensor(
        [[-80.0, -60.0, -20.0, -17.0, -10.0, -1e-3], [80.0, 60.0, 30.0, 21.0, 19.0, 1e-3]]
    )
    for renormalize in (False, True):
        got = route(
            logits.to(device),
            6,
            **DEFAULTS | {"score": score, "order": "topk_first", "renormalize": renormalize},
        )
        want = twin(logits.double(), 6, score=score, order="topk_first", renormalize=renormalize)
        assert got[1].tolist() == want.experts.tolist()
        torch.testing.assert_close(got[0].cpu(), want.gates.float(), rtol=1e-5, atol=1e-37)
        check_backward(logits, 6, device, score, "topk_first", renormalize)


@without_gpu
@pytest.mark.parametrize(("score", "order", "direction"), pairwise(list(SCORES), ORDERS, [-1, 1]))
def test_bounds_do_not_suppose_exact_arithmetic(device, score, order, direction):
    logits = torch.stack([torch.randperm(32) for _ in range(3)]) / 4 - 4
    exact, _ = route(logits, 32, **DEFAULTS | {"score": score, "order": order})
    with inexact.inexact(direction):
        gates, _ = route(logits, 32, **DEFAULTS | {"score": score, "order": order})
        assert not torch.equal(gates, exact)
        for experts, top_k in ((160, 6), (32, 32), (5, 5), (1, 1)):
            test_sizes(device, experts, top_k, score, order)
        if order == "topk_first":
            test_far_logits_keep_their_precision(device, score)


def test_strides(device):
    logits = torch.randint(-16, 17, (12, 40)) / 4
    for view in (
        logits.t(),
        logits[::2, 1::3],
        logits[:1].expand(6, 40),
        logits[:, :1].expand(12, 9),
    ):
        moved = torch.as_strided(
            logits.to(device), view.shape, view.stride(), view.storage_offset()
        )
        for order in ORDERS:
            got, want = route(moved, 4, **DEFAULTS | {"order": order}), twin(view, 4, order=order)
            assert got[1].tolist() == want.experts.tolist()
            torch.testing.assert_close(got[0].cpu(), want.gates, rtol=GATES, atol=0)
            for d_gates in (torch.randn(4, len(view)).t(), torch.ones(()).expand(len(view), 4)):
                leaf = view.clone().requires_grad_()
                want_d = torch.autograd.grad(twin(leaf, 4, order=order).gates, leaf, d_gates)[0]
                on_device = d_gates.to(device)  # keeps strides
                got_d = route_backward(on_device, moved, got[1], "softmax", order, False, 1.0)
                torch.testing.assert_close(got_d.cpu(), want_d, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("score", SCORES)
def test_dropped_choices_add_nothing(device, score, order):
    logits, d_gates = torch.randn(5, 6), torch.randn(5, 3)
    experts = twin(logits, 3, score=score, order=order).experts
    experts[0, 1] = experts[1] = experts[4, 2] = 6
    got = route_backward(
        d_gates.to(device), logits.to(device), experts.to(device), score, order, False, 1.0
    ).cpu()
    leaf = logits.clone().requires_grad_()
    padded = torch.nn.functional.pad(oracle.score(score, leaf), (0, 1))
    if order == "topk_first":
        chosen = torch.nn.functional.pad(leaf, (0, 1), value=-float("inf")).gather(
            1, experts.long()
        )
        padded = torch.zeros(5, 7).scatter(
            1, experts.long(), torch.where(experts < 6, oracle.score(score, chosen), 0.0)
        )
    kept = torch.where(experts < 6, d_gates, 0.0)
    want = torch.autograd.grad(padded.gather(1, experts.long()), leaf, kept)[0].nan_to_num(0.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[1].count_nonzero() == 0


def test_scores_that_underflow_have_a_finite_gradient(device):
    """Where the twin's autograd divides 0 by 0."""
    logits = torch.tensor([[-float("inf"), -200.0, -1.0]], device=device)
    _, experts = route(logits, 3, **DEFAULTS | {"score": "sqrtsoftplus"})
    d_logits = route_backward(
        torch.ones(1, 3, device=device), logits, experts, "sqrtsoftplus", "score_first", False, 1.0
    )
    assert d_logits[0, :2].tolist() == [0.0, 0.0] and d_logits[0, 2] > 0
    # all scores are 0, and so is what renormalizing divides by
    logits = torch.full((1, 3), -200.0, device=device)
    gates, experts = route(logits, 2, **DEFAULTS | {"score": "sigmoid", "renormalize": True})
    assert gates.tolist() == [[0.0, 0.0]] and experts.tolist() == [[0, 1]]
    d_logits = route_backward(
        torch.ones(1, 2, device=device), logits, experts, "sigmoid", "score_first", True, 1.0
    )
    assert d_logits.tolist() == [[0.0, 0.0, 0.0]]


def test_more_rows_than_one_program_takes(device):
    logits = torch.randint(-16, 17, (1100, 4)) / 4
    check_route(logits, 2, device, renormalize=True)
    check_backward(logits, 2, device, "softmax", "score_first", False)


def test_no_tokens_and_meta(device):
    for where in (device, "meta"):
        logits = torch.empty(0 if where == device else 7, 6, dtype=torch.bfloat16, device=where)
        gates, experts = route(logits, 2, **DEFAULTS)
        assert (gates.shape, gates.dtype) == ((len(logits), 2), torch.float32)
        assert (experts.shape, experts.dtype) == ((len(logits), 2), torch.int32)
        d_logits = route_backward(gates, logits, experts, "softmax", "score_first", False, 1.0)
        assert (d_logits.shape, d_logits.dtype) == (logits.shape, torch.bfloat16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_public_function_and_its_gradient_on_every_combination(device, score, order, renormalize):
    """Through the registered operators; RMS and largest error of the gradient at most twice those
    of torch alone."""
    logits, d_gates = torch.randn(200, 12), torch.randn(200, 3)
    options = {"score": score, "order": order, "renormalize": renormalize, "scale": 1.5}

    def result(f, dtype, where="cpu"):
        leaf = logits.to(where, dtype).requires_grad_()
        gates, experts = f(leaf, 3, **options)
        return gates.detach(), torch.autograd.grad(gates, leaf, d_gates.to(gates))[0], experts

    exact, plain, got = (
        result(twin, torch.float64),
        result(twin, torch.float32),
        result(topk_route, torch.float32, device),
    )
    for name, ours, theirs, right in zip(("gates", "d_logits"), got, plain, exact, strict=False):
        contract.assert_accurate(ours, theirs, right, name, slack=UNITS)
    assert torch.equal(got[2].cpu(), exact[2])


@pytest.mark.parametrize(
    ("experts", "top_k", "launched"), [(1024, 32, 2), (1025, 2, 0), (64, 33, 0)]
)
def test_beyond_its_limits_the_twin_runs(device, experts, top_k, launched):
    logits = torch.randn(3, experts, device=device, requires_grad=True)
    with observe() as launches:
        gates, chosen = topk_route(logits, top_k)
        gates.sum().backward()
    assert len(launches) == launched and logits.grad.isfinite().all()
    assert torch.equal(chosen.cpu(), twin(logits.detach().cpu(), top_k).experts)


def test_a_token_does_not_depend_on_the_others_and_runs_repeat(device):
    logits, d_gates = torch.randn(700, 12, device=device), torch.randn(700, 3, device=device)
    chosen = torch.randperm(700, device=device)[:333]

    def both(rows):
        gates, experts = route(logits[rows], 3, **DEFAULTS | {"renormalize": True})
        return (
            gates,
            experts,
            route_backward(
                d_gates[rows], logits[rows], experts, "softmax", "score_first", True, 1.0
            ),
        )

    whole, again, part = both(slice(None)), both(slice(None)), both(chosen)
    assert all(
        torch.equal(a, b) and torch.equal(a[chosen], c)
        for a, b, c in zip(whole, again, part, strict=True)
    )


@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_its_definition(device, score):
    """All experts chosen: the gates are the scores, and their gradient is the definition's."""
    logits, d_gates = torch.linspace(-12, 12, 21).view(3, 7), torch.randn(3, 7)
    rule = GateRule(score)
    gates, experts = gpu.route(logits.to(device), 7, rule)
    got_d = gpu.route_backward(d_gates.to(device), logits.to(device), experts, rule)

    leaf = logits.double().requires_grad_()
    want = oracle.score(score, leaf).gather(1, experts.cpu().long())
    (want_d,) = torch.autograd.grad(want, leaf, d_gates.double())
    torch.testing.assert_close(gates.cpu().double(), want.detach(), rtol=GATES, atol=0)
    torch.testing.assert_close(got_d.cpu().double(), want_d, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [gpu.route_kernel, gpu.route_backward_kernel])
def test_the_kernels_refuse_a_score_they_do_not_know(device, kernel, monkeypatch):
    """Also one that is in the table but has no code in ``ironmoe.kernels.gpu.scores``."""
    monkeypatch.setitem(SCORES, "relu", SCORES["sigmoid"])
    logits = torch.zeros(3, 4, device=device)
    with pytest.raises(Exception) as error:
        if kernel is gpu.route_kernel:
            gpu.route(logits, 2, GateRule("relu"))
        else:
            chosen = torch.zeros(3, 2, dtype=torch.int32, device=device)
            gpu.route_backward(logits[:, :2], logits, chosen, GateRule("relu"))
    raised, said = error.value, ""
    while raised is not None:  # each jit function that was called wraps the error once more
        said, raised = said + str(raised), raised.__cause__
    assert "SCORE must be one of" in said and all(name in said for name in ("softmax", "sigmoid"))
