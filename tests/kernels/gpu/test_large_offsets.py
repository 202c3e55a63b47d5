"""Addresses beyond 2³¹ elements. The memory in between is never touched, so on CPU it costs
nothing; a GPU needs 7 GB."""

import pytest
import torch

from ironmoe.kernels import Routing, combine, expert_mlp, plan_dispatch, topk_route
from ironmoe.kernels.tuning import CHIPS, assume, chip_of

FAR = 3 * 2**30  # beyond what 32 bits count to, whatever the last stride is rounded down to
T, D, F, E, K = 6, 16, 24, 3, 2


@pytest.fixture(params=["TMA", "pointers"])
def loads(request, device):
    """How weights are read, where this chip has the choice."""
    chip = chip_of(torch.empty(0, device=device))
    if request.param == "TMA" and not chip.tma:
        pytest.skip(f"{chip.name} has no TMA")
    with assume(
        chip if request.param == "TMA" else CHIPS["sm_80"]._replace(processors=chip.processors)
    ):
        yield device


def far_apart(tensor, axis_stride=FAR):
    """The same values, with FAR elements from the first entry of the first axis to the last."""
    stride = axis_stride // (len(tensor) - 1)
    memory = tensor.new_empty(axis_stride + tensor[0].numel())
    return memory.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride())).copy_(tensor)


def results(x, w_in, w_out, gates, experts, dy):
    leaves = [leaf.detach().requires_grad_() for leaf in (x, w_in, w_out, gates)]
    x, w_in, w_out, gates = leaves
    y = expert_mlp(x, w_in, w_out, Routing(gates, experts))
    return y, *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("far", ["x", "w_in", "w_out", "dy"])
def test_the_expert_gives_the_same_bits(loads, far):
    shapes = {"x": (T, D), "w_in": (E, F, D), "w_out": (E, D, F), "dy": (T, D)}
    near = {name: torch.randn(shape).half().to(loads) for name, shape in shapes.items()}
    routing = topk_route(torch.randn(T, E, device=loads), K)
    arguments = {"gates": routing.gates, "experts": routing.experts}
    expected = results(**near, **arguments)
    got = results(**near | {far: far_apart(near[far])}, **arguments)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_combine_gives_the_same_bits(device):
    experts = torch.randint(E, (T, K), device=device)
    plan, gates = plan_dispatch(experts, E), torch.rand(T, K, device=device)
    rows = torch.randn(T * K, D).half().to(device)
    found = []
    for leaf in (rows, far_apart(rows)):
        leaf = leaf.detach().requires_grad_()
        y = combine(leaf, Routing(gates, experts), plan)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), [leaf])))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_top_k_gives_the_same(device):
    """Strides that are multiples of 16 are compiled for themselves, which may round differently in
    the last places."""
    logits = torch.randn(5, 8).half().to(device)
    found = []
    for leaf in (logits, far_apart(logits), far_apart(logits.t().contiguous()).t()):
        leaf = leaf.detach().requires_grad_()
        gates, experts = topk_route(leaf, 3)
        found.append((gates, experts, *torch.autograd.grad(gates.square().sum(), [leaf])))
    gates, experts, d_logits = found[0]
    for other_gates, other_experts, other_d_logits in found[1:]:
        assert torch.equal(other_experts, experts)
        torch.testing.assert_close(other_gates, gates, rtol=1e-6, atol=0)
        torch.testing.assert_close(other_d_logits, d_logits, rtol=1e-3, atol=1e-6)
