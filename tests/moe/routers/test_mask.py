"""A token mask: padding costs nothing, is counted nowhere and reaches no gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.kernels import ExpertGroups, Routing
from ironmoe.moe import (
    BALANCE_LOSSES,
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    TopKRouter,
    balance_loss,
    importance_loss,
    load_loss,
    router_z_loss,
)
from ironmoe.moe.routers.capacity import places, places_of

D, E, K, T = 8, 6, 2, 30
STD = 0.3
LOSSES = {
    "importance": lambda z, noisy, **mask: importance_loss(z.softmax(-1), **mask),
    "load": lambda z, noisy, **mask: load_loss(z, noisy, STD, K, **mask),
    "balance": lambda z, noisy, **mask: balance_loss(z.softmax(-1), **mask),
    "z": lambda z, noisy, **mask: router_z_loss(z, **mask),
}
MASKS = {
    "some": torch.rand(T, generator=torch.Generator().manual_seed(1)) < 0.6,
    "whole groups": torch.arange(T) % 20 >= 10,
    "all real": torch.ones(T, dtype=torch.bool),
    "one real": torch.arange(T) == 17,
    "none real": torch.zeros(T, dtype=torch.bool),
}
ROUTERS = {
    "V-MoE's": {},
    "DeepSeek's": {
        "score": "sigmoid",
        "selection_bias": True,
        "groups": ExpertGroups(3, 2),
        "renormalize": True,
        "scale": 2.5,
    },
    "gpt-oss's": {"order": "topk_first", "bias": True},
    "DBRX's": {"renormalize": 1.0},
}
WEIGHTS = {"importance_weight": 0.3, "load_weight": 0.2, "balance_weight": 0.7, "z_weight": 0.05}
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
all_sizes = pytest.mark.parametrize("size", [10, 7, 100, None])


def parts(size):
    return list(torch.arange(T).split(size or T))


def with_padding(x, mask, value):
    return x.where(mask[:, None], value).requires_grad_()


@all_masks
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_masked_loss_is_that_of_the_real_tokens(loss, mask):
    z, noise = torch.randn(2, T, E, dtype=torch.float64)
    expected = loss(z[mask], (z + STD * noise)[mask]) if mask.any() else torch.zeros(()).double()
    for value in (0.0, float("nan"), float("inf")):
        padded = with_padding(z, mask, value)
        found = loss(padded, padded + STD * noise, mask=mask)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_padding_reaches_the_gradient_of_a_loss(value, dtype):
    mask = MASKS["some"].view(3, 10) & torch.tensor([[True], [False], [True]])
    z = torch.randn(3, 10, E).to(dtype).where(mask[..., None], value).requires_grad_()
    gates = z.detach().softmax(-1).requires_grad_()
    for loss, inputs in (
        (importance_loss(gates, mask=mask), gates),
        (balance_loss(gates, mask=mask), gates),
        (load_loss(z, z + 0.1, STD, K, mask=mask), z),
        (router_z_loss(z, mask=mask), z),
    ):
        (grad,) = torch.autograd.grad(loss.sum(), inputs)
        assert loss.shape == (3,) and loss[1] == 0 and loss.isfinite().all()
        assert grad.isfinite().all() and not grad[~mask].any()


@all_sizes
@all_masks
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
def test_a_router_routes_and_weighs_the_real_tokens_alone(options, mask, size):
    router = TopKRouter(D, E, K, **options, **WEIGHTS, dtype=torch.float64)
    if router.selection_bias is not None:
        torch.nn.init.normal_(router.selection_bias, std=0.2)
    x, noise = torch.randn(T, D, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    found = []
    for value in (0.0, 1e3, float("nan")):
        padded, router.noise = with_padding(x, mask, value), noise
        routing, _, aux_loss, _ = router(padded, size, mask=mask)
        loss = aux_loss + routing.gates.square().sum()
        grads = torch.autograd.grad(loss, [padded, *router.parameters()], allow_unused=True)
        found.append([*routing, aux_loss, *(g for g in grads if g is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    gates, experts, aux_loss, grad_x, *_ = found[0]
    assert (experts[~mask] == E).all() and not gates[~mask].any() and not grad_x[~mask].any()
    if router.selection_bias is not None:
        real = torch.bincount(experts[mask].flatten().long(), minlength=E)
        assert torch.equal(router.choices[:E], 3 * real)
    losses = []
    for part in parts(size):
        real = part[mask[part]]
        router.noise = noise[real]
        alone, _, loss, _ = router(x[real])
        assert torch.equal(experts[real], alone.experts)
        torch.testing.assert_close(gates[real], alone.gates)
        losses += [loss] if len(real) else []
    expected = torch.stack(losses).mean() if losses else torch.zeros(()).double()
    torch.testing.assert_close(aux_loss, expected)


@all_masks
def test_an_ensemble_leaves_the_padding_of_each_member_out(mask):
    router = EnsembleRouter(D, E, K, ensemble_size=2, **WEIGHTS, dtype=torch.float64)
    x, noise = torch.randn(T, D, dtype=torch.float64), torch.randn(2, T, E // 2).double()
    router.noise = noise
    padded = with_padding(x, mask, float("nan"))
    routing, _, aux_loss, _ = router(padded.repeat(2, 1), mask=mask.repeat(2))
    router.noise = noise[:, mask]
    alone, _, expected, _ = router(x[mask].repeat(2, 1))
    assert torch.equal(routing.experts[mask.repeat(2)], alone.experts)
    assert (routing.experts[~mask.repeat(2)] == E).all()
    torch.testing.assert_close(aux_loss, expected)


@all_sizes
@all_masks
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"factor": 0.7, "multiple_of": 1},
        {"factor": 0.6},
        {"places": 2},
        {"factor": 0.7, "multiple_of": 1, "renormalize": True},
    ],
)
def test_a_capacity_serves_the_real_tokens_alone(options, priority, mask, size):
    capacity = Capacity(**options, priority=priority)
    gates = torch.rand(T, E).round(decimals=1).sort(dim=1, descending=True, stable=True)
    routing = Routing(gates.values[:, :K], gates.indices[:, :K].to(torch.int32))
    found = capacity(routing, E, size or T, mask)
    assert (found.experts[~mask] == E).all() and not found.gates[~mask].any()
    for part in parts(size):
        real = part[mask[part]]
        alone = capacity(Routing(*(field[real] for field in routing)), E, max(len(real), 1))
        for field, expected in zip(found, alone, strict=True):
            assert torch.equal(field[real], expected)
    if mask.all():
        for field, expected in zip(found, capacity(routing, E, size or T), strict=True):
            assert torch.equal(field, expected)


@pytest.mark.parametrize("multiple_of", [1, 4, 7])
@pytest.mark.parametrize("factor", [0.1, 1 / 3, 0.7, 1.0, 1.05, 1.1, 2.0, 8.0])
def test_places_on_the_device_are_those_of_the_host(factor, multiple_of):
    choices = torch.cat([torch.arange(600), torch.tensor([10**6, 2**24 + 1, 3 * 10**8])])
    for num_experts in (1, 3, 7, 8, 49, 256):
        expected = [places(n, num_experts, factor, multiple_of) for n in choices.tolist()]
        assert places_of(choices, num_experts, factor, multiple_of).tolist() == expected


def test_members_of_an_ensemble_share_the_places_of_the_real_tokens():
    capacity = Capacity(0.5, images_per_group=2, multiple_of=1).for_members(3)
    routing = Routing(torch.ones(9, 1), torch.zeros(9, 1, dtype=torch.int32))
    mask = torch.arange(9) >= 2
    # 7 real tokens · 3 members · 0.5 / 4 experts
    assert (capacity(routing, 4, 9, mask).experts == 0).sum() == places(21, 4, 0.5, 1) == 3


@all_sizes
@all_masks
@pytest.mark.parametrize("options", [{"factor": 1.3, "multiple_of": 1}, {"factor": 3.0}])
def test_experts_choose_among_the_real_tokens_alone(options, mask, size):
    router = ExpertChoiceRouter(D, E, **options, dtype=torch.float64).eval()
    x = torch.randn(T, D, dtype=torch.float64)
    x[3::5] = x[::5]  # ties
    padded = with_padding(x, mask, float("nan"))
    routing, _, aux_loss, plan = router(padded, size, mask=mask)
    (grad,) = torch.autograd.grad(routing.gates.square().sum(), padded)
    assert aux_loss is None and plan is None
    assert grad.isfinite().all() and not grad[~mask].any()
    assert (routing.experts[~mask] == E).all() and not routing.gates[~mask].any()
    for part in parts(size):
        real = part[mask[part]]
        alone = router(x[real]).routing
        assert torch.equal(routing.experts[real], alone.experts)
        torch.testing.assert_close(routing.gates[real], alone.gates)


@pytest.mark.parametrize(
    "router",
    [
        TopKRouter(D, E, K, noise_std=0.0, balance_weight=0.1, selection_bias=True),
        EnsembleRouter(D, E, K, ensemble_size=2, noise_std=0.0),
        ExpertChoiceRouter(D, E, noise_std=0.0),
    ],
    ids=lambda router: type(router).__name__,
)
def test_a_masked_router_compiles_whole(router):
    x, mask = torch.randn(T, D), MASKS["some"]
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(x, 10, mask=mask), router(x, 10, mask=mask), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_masked_capacity_compiles_whole():
    capacity, mask = Capacity(0.7, priority=True), MASKS["some"]
    routing = Routing(torch.rand(T, K), torch.randint(E, (T, K), dtype=torch.int32))
    torch._dynamo.reset()
    compiled = torch.compile(capacity, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(routing, E, 7, mask), capacity(routing, E, 7, mask))


@pytest.mark.parametrize("balance", BALANCE_LOSSES)
def test_nothing_masked_waits_for_the_device(balance):
    """A fake tensor has no values: one that the host asks for is an error."""
    with FakeTensorMode():
        x, mask = torch.empty(T, D), torch.empty(T, dtype=torch.bool)
        top_k = TopKRouter(D, E, K, **WEIGHTS, balance=balance, selection_bias=True)
        ensemble = EnsembleRouter(D, E, K, ensemble_size=2, balance=balance, **WEIGHTS)
        for router in (top_k, ensemble, ExpertChoiceRouter(D, E)):
            routing, _, aux_loss, _ = router(x, 7, mask=mask)
            kept = Capacity(0.7, priority=True)(routing, E, 7, mask)
            assert kept.experts.shape == routing.experts.shape
            assert aux_loss is None or aux_loss.shape == ()


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("real", [True, False])
def test_no_token_and_one(tokens, real):
    mask = torch.full((tokens,), real)
    for router in (TopKRouter(D, E, K), ExpertChoiceRouter(D, E, multiple_of=1)):
        routing, _, aux_loss, _ = router(torch.randn(tokens, D), mask=mask)
        assert len(routing.experts) == tokens and (aux_loss is None or aux_loss.isfinite())
        assert (routing.experts < E).any() == bool(mask.any())
    routing = Routing(torch.rand(tokens, K), torch.zeros(tokens, K, dtype=torch.int32))
    assert len(Capacity(1.0)(routing, E, 4, mask).experts) == tokens


def test_a_mask_of_integers_is_one_and_what_is_none_is_named():
    router, x = TopKRouter(D, E, K).eval(), torch.randn(T, D)
    mask = MASKS["some"]
    for kind in (torch.int64, torch.uint8):
        expected = router(x, mask=mask).routing.experts
        assert torch.equal(router(x, mask=mask.to(kind)).routing.experts, expected)
    routing = router(x).routing
    for call in (
        lambda mask: router(x, mask=mask),
        lambda mask: ExpertChoiceRouter(D, E)(x, mask=mask),
        lambda mask: Capacity(1.0)(routing, E, T, mask),
    ):
        with pytest.raises(ValueError, match=r"mask must have shape \(30,\), got \(29,\)"):
            call(mask[1:])
        with pytest.raises(ValueError, match=r"mask must be bool, or integers .* got"):
            call(mask.float())
