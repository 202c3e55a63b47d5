import math

import pytest
import torch

from ironmoe.kernels import Routing
from ironmoe.moe import Capacity, EnsembleRouter, ExpertChoiceRouter, MoE, SoftMoE, VMoE

# of the official dispatch test
GATES = torch.tensor([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])


def chosen(gates_TE, top_k):
    gates, experts = gates_TE.sort(dim=1, descending=True, stable=True)
    return Routing(gates[:, :top_k], experts[:, :top_k].to(torch.int32))


def test_the_official_dispatch_test():
    routing = chosen(GATES, 2)
    vanilla, priority = (Capacity(places=2, priority=p)(routing, 3, 3) for p in (False, True))
    assert vanilla.experts.tolist() == [[0, 2], [0, 3], [2, 3]]
    torch.testing.assert_close(vanilla.gates, torch.tensor([[0.4, 0.2], [0.5, 0.0], [0.6, 0.0]]))
    assert priority.experts.tolist() == [[0, 3], [0, 2], [2, 3]]
    torch.testing.assert_close(priority.gates, torch.tensor([[0.4, 0.0], [0.5, 0.4], [0.6, 0.0]]))


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "expected"),
    [
        (2308, 2, 8, 1.5, 868),
        (1160, 2, 32, 1.05, 80),
        (400, 2, 8, 1.05, 108),
        (400, 2, 8, 4.0, 400),
    ],
)
def test_places_are_those_of_the_official_code(tokens, top_k, experts, factor, expected):
    assert Capacity(factor).places_for(tokens * top_k, experts) == expected


def slowly(routing, num_experts, size, places, priority):
    """Token by token, choice by choice."""
    experts = routing.experts.tolist()
    kept = [[False] * len(row) for row in experts]
    for first in range(0, len(experts), size):
        tokens = list(range(first, min(first + size, len(experts))))
        if priority:
            tokens.sort(key=lambda t: -routing.gates[t, 0].item())
        taken = [0] * num_experts
        room = places(len(tokens))
        for k in range(len(experts[0])):
            for t in tokens:
                e = experts[t][k]
                if e < num_experts and taken[e] < room:
                    kept[t][k] = True
                    taken[e] += 1
    return torch.tensor(kept)


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize(
    ("tokens", "size", "num_experts", "top_k", "options"),
    [
        (60, 20, 5, 2, {"factor": 0.7}),
        (50, 20, 5, 2, {"factor": 0.7, "multiple_of": 1}),  # the last group is smaller
        (13, 100, 4, 4, {"factor": 0.5, "multiple_of": 1}),
        (40, 10, 3, 1, {"places": 2}),
        (7, 3, 1, 1, {"places": 1}),
        (31, 7, 16, 3, {"factor": 16.0}),
    ],
)
def test_beside_a_slow_reference(tokens, size, num_experts, top_k, options, priority):
    for seed in range(5):
        torch.manual_seed(seed)
        # rounded: with ties
        routing = chosen(torch.rand(tokens, num_experts).round(decimals=1 if seed else 3), top_k)
        if seed == 2:  # dropped before by somebody else
            routing.experts[::3, -1] = num_experts
        capacity = Capacity(**options, priority=priority)

        def places(group, capacity=capacity):
            return capacity.places_for(group * top_k, num_experts)

        kept = slowly(routing, num_experts, size, places, priority)
        result = capacity(routing, num_experts, size)
        assert torch.equal(result.experts < num_experts, kept)
        assert torch.equal(result.experts[kept], routing.experts[kept])
        assert torch.equal(result.gates, routing.gates * kept)


def test_no_tokens_and_no_drops():
    empty = Routing(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32))
    assert Capacity(1.0)(empty, 4, 8).gates.shape == (0, 2)
    routing = chosen(torch.rand(64, 8), 2)
    for field, same in zip(Capacity(8 / 2)(routing, 8, 32), routing, strict=True):
        assert torch.equal(field, same)


def test_images_of_a_group_influence_each_other_and_others_do_not():
    layer = MoE(
        8, 16, 4, 1, capacity=Capacity(0.5, images_per_group=2, multiple_of=1), dtype=torch.float64
    ).eval()
    x = torch.randn(6, 9, 8, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(layer(x[2:4]), y[2:4])
    torch.testing.assert_close(layer(x[:5]), torch.cat([y[:4], layer(x[4:5])]))
    assert not torch.allclose(layer(x[1:3]), y[1:3])
    assert ((y == 0).all(-1)).any()  # dropped tokens
    with pytest.raises(
        ValueError, match=r"must have shape \(images, tokens, 8\) for images_per_group"
    ):
        layer(x[0])


def test_gradients_with_drops():
    layer = MoE(4, 6, 3, 2, capacity=Capacity(0.6, multiple_of=1), dtype=torch.float64).eval()
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiled_whole(mode):
    layer = MoE(8, 16, 4, 2, capacity=Capacity(0.7, images_per_group=2, priority=True)).train(
        mode == "train"
    )
    layer.router.noise_std = 0.0
    x = torch.randn(4, 5, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expert_rows_is_expert_mlp(dtype):
    layer = MoE(8, 16, 4, 2, capacity=Capacity(0.7), dtype=dtype).eval()
    rounded = MoE(
        8, 16, 4, 2, capacity=Capacity(0.7), dispatch_dtype=dtype, dtype=dtype
    ).eval()  # rounds to its own dtype: not at all
    rounded.load_state_dict(layer.state_dict())
    x = torch.randn(20, 8, dtype=dtype)
    torch.testing.assert_close(rounded(x), layer(x))
    plain, in_rows = (
        torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (layer, rounded)
    )
    for a, b in zip(in_rows, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dispatch_in_bfloat16_rounds_rows_and_outputs():
    layer = MoE(8, 16, 4, 2, dispatch_dtype=torch.bfloat16).eval()
    x = torch.randn(20, 8)
    gates, experts = layer.router(x).routing
    expected = torch.zeros_like(x)
    for t in range(20):
        for gate, e in zip(gates[t], experts[t].long(), strict=True):
            hidden = torch.nn.functional.gelu(
                layer.fc1.weight[e] @ x[t].bfloat16().float() + layer.fc1.bias[e]
            )
            expected[t] += (
                gate * (layer.fc2.weight[e] @ hidden + layer.fc2.bias[e]).bfloat16().float()
            )
    difference = (layer(x) - expected).abs()
    # an output beside a rounding boundary may go the other way
    assert difference.max() < 0.01 and difference.mean() < 1e-5


class TestExpertChoice:
    def test_by_hand(self):
        router = ExpertChoiceRouter(
            4, 3, 1.5, tokens_per_group=8, multiple_of=1, dtype=torch.float64
        ).eval()
        x = torch.randn(20, 4, dtype=torch.float64)
        routing, logits, aux_loss, plan = router(x, 8)
        gates = (x @ router.weight.T).softmax(-1)
        expected = torch.zeros_like(gates)
        for group in (range(0, 8), range(8, 16), range(16, 20)):
            for e in range(3):
                best = sorted(group, key=lambda t: (-gates[t, e].item(), t))[
                    : math.ceil(1.5 * len(group) / 3)
                ]
                expected[best, e] = gates[best, e]
        torch.testing.assert_close(routing.gates, expected)
        assert torch.equal(routing.experts < 3, expected > 0) and aux_loss is None
        torch.testing.assert_close(logits, x @ router.weight.T)
        assert plan.offsets.tolist() == [0, 10, 20, 30]

    @pytest.mark.parametrize("activation", ["gelu", "swiglu"])
    def test_layer_equals_the_plain_sum(self, activation):
        layer = MoE(
            6, 8, 3, router=ExpertChoiceRouter(6, 3, images_per_group=1), activation=activation
        ).eval()
        x = torch.randn(4, 7, 6, requires_grad=True)
        y = layer(x)
        routing = layer.router(x.flatten(0, 1), 7).routing
        from ironmoe.kernels import expert_mlp

        plain = expert_mlp(
            x.flatten(0, 1), layer.fc1.weight, layer.fc2.weight, routing, b_in=layer.fc1.bias,
            b_out=layer.fc2.bias, activation=activation
        )  # fmt: skip
        torch.testing.assert_close(y.flatten(0, 1), plain)
        parameters = [x, *layer.parameters()]
        for a, b in zip(
            *(torch.autograd.grad(z.square().sum(), parameters) for z in (y, plain)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_gradcheck(self):
        layer = MoE(
            4, 5, 3, router=ExpertChoiceRouter(4, 3, dtype=torch.float64), dtype=torch.float64
        ).eval()
        assert torch.autograd.gradcheck(
            layer, torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
        )

    def test_on_the_operators(self, device):
        layer = MoE(16, 16, 4, router=ExpertChoiceRouter(16, 4, multiple_of=1)).eval()
        x = torch.randn(2, 9, 16)
        expected = layer.double()(x.double()).float()
        torch.testing.assert_close(
            layer.float().to(device)(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("shape", [(0, 6), (1, 6), (2, 0, 6)])
    def test_few_tokens(self, shape):
        layer = MoE(6, 8, 3, router=ExpertChoiceRouter(6, 3)).eval()
        assert layer(torch.randn(shape)).shape == shape

    def test_what_is_wrong_is_named(self):
        with pytest.raises(ValueError, match="capacity must be None with a ExpertChoiceRouter"):
            MoE(6, 8, 3, router=ExpertChoiceRouter(6, 3), capacity=Capacity(1.0))
        with pytest.raises(ValueError, match="factor must be above 0"):
            ExpertChoiceRouter(6, 3, 0)
        with pytest.raises(
            ValueError, match="router must have num_experts = 4 like the layer, got 3"
        ):
            MoE(6, 8, 4, router=ExpertChoiceRouter(6, 3))


class TestSoft:
    def test_by_hand_and_images_are_independent(self):
        layer = SoftMoE(6, 8, 3, 2, dtype=torch.float64).eval()
        torch.nn.init.constant_(layer.scale, 3.0)
        x = torch.randn(2, 5, 6, dtype=torch.float64)
        y = layer(x)
        for image, got in zip(x, y, strict=True):
            phi = layer.phi.flatten(0, 1)
            unit = [z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (image, phi)]
            scores = 3 * unit[0] @ unit[1].T
            slots = scores.softmax(0).T @ image
            out = torch.stack(
                [
                    layer.fc2.weight[s // 2]
                    @ torch.nn.functional.gelu(
                        layer.fc1.weight[s // 2] @ slot + layer.fc1.bias[s // 2]
                    )
                    + layer.fc2.bias[s // 2]
                    for s, slot in enumerate(slots)
                ]
            )
            torch.testing.assert_close(got, scores.softmax(1) @ out)

    def test_gradients_dtypes_and_compile(self):
        layer = SoftMoE(4, 5, 2, 2, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            layer, torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        )
        for dtype in (torch.bfloat16, torch.float32):
            assert SoftMoE(4, 5, 2, dtype=dtype)(torch.randn(2, 3, 4, dtype=dtype)).dtype == dtype
        layer, x = SoftMoE(4, 5, 2), torch.randn(2, 3, 4)
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).isfinite().all()
        assert layer(torch.zeros(0, 3, 4)).shape == (0, 3, 4)

    def test_what_is_wrong_is_named(self):
        with pytest.raises(ValueError, match=r"x must have shape \(images, tokens, 4\)"):
            SoftMoE(4, 5, 2)(torch.zeros(3, 4))
        with pytest.raises(ValueError, match="slots_per_expert must be at least 1, got 0"):
            SoftMoE(4, 5, 2, 0)


def test_ensemble_members_keep_to_their_own_experts():
    router = EnsembleRouter(6, 6, 2, ensemble_size=3).eval()
    x = torch.randn(10, 6)
    routing, logits, *_ = router(x.repeat(3, 1))
    for member in range(3):
        own = slice(10 * member, 10 * member + 10)
        assert ((routing.experts[own] // 2) == member).all()
        expected = (x @ router.weight[2 * member : 2 * member + 2].T).softmax(-1)
        torch.testing.assert_close(routing.gates[own], expected.sort(1, descending=True).values)
        assert logits[own].isfinite().sum() == 20
    for options, message in (
        ({"ensemble_size": 4}, "must divide num_experts = 6, got 4"),
        ({"ensemble_size": 6}, "top_k must be at most the 1 experts of a member, got 2"),
        ({"ensemble_size": 2, "bias": True}, "EnsembleRouter has no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            EnsembleRouter(6, 6, 2, **options)
    with pytest.raises(ValueError, match="the same tokens for 3 members, got 10"):
        router(x)


def test_what_is_no_capacity_is_named():
    for make in (
        lambda: MoE(8, 16, 4, capacity=1.05),
        lambda: VMoE(8, 4, 16, 1, 2, 16, 3, moe_layers=[0], capacity=1.05),
    ):
        with pytest.raises(TypeError, match="capacity must be a Capacity or None, got 1"):
            make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either factor or places"),
        ({"factor": 1.0, "places": 3}, "give either factor or places"),
        ({"factor": 0.0}, "factor must be finite and above 0, got 0"),
        ({"factor": float("nan")}, "factor must be finite"),
        ({"places": 0}, "places must be at least 1"),
        ({"factor": 1.0, "multiple_of": 0}, "multiple_of must be at least 1"),
        ({"factor": 1.0, "images_per_group": 2, "tokens_per_group": 2}, "not both"),
        ({"factor": 1.0, "images_per_group": 0}, "images_per_group must be at least 1"),
    ],
)
def test_bad_capacities_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**options)


@pytest.mark.parametrize("group", [{"images_per_group": 2}, {"images_per_group": 3}, {}])
def test_an_ensemble_has_the_places_of_the_official_groups(group):
    """Members share a group there, and have experts of their own: the same tokens are dropped as
    from the members mixed."""
    images, tokens, members, num_experts = 6, 5, 3, 6
    router = EnsembleRouter(8, num_experts, 1, ensemble_size=members).eval()
    x_BND = torch.randn(images, tokens, 8)
    routing = router(x_BND.flatten(0, 1).repeat(members, 1)).routing
    capacity = Capacity(0.7, multiple_of=1, **group)
    ours = capacity.for_members(members)
    kept = (
        ours(routing, num_experts, ours.tokens_in_group((members * images, tokens, 8))).experts
        < num_experts
    )
    # image, token, member
    mixed = Routing(
        *(f.view(members, images, tokens).permute(1, 2, 0).reshape(-1, 1) for f in routing)
    )
    size = group.get("images_per_group", images) * tokens * members
    expected = Capacity(0.7, multiple_of=1)(mixed, num_experts, size).experts < num_experts
    assert not expected.all()
    assert torch.equal(kept.view(members, images, tokens).permute(1, 2, 0).reshape(-1, 1), expected)
