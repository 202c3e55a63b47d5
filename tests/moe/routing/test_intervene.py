import pytest
import torch

from ironmoe.kernels import Routing
from ironmoe.moe import (
    Capacity,
    ExpertChoiceRouter,
    MoE,
    TopKRouter,
    VMoE,
    intervene,
    trace_routing,
)
from ironmoe.moe.policies import (
    AllExperts,
    DropBest,
    DropRank,
    FrozenGates,
    Lowest,
    MaskExperts,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    RenormalizedGates,
    Replay,
    UniformGates,
    UseRanks,
)

D, F, E, K, T = 6, 10, 5, 2, 40


@pytest.fixture
def layer():
    return MoE(D, F, E, K, dtype=torch.float64).eval()


@pytest.fixture
def x():
    return torch.randn(T, D, dtype=torch.float64)


def by_hand(layer, x, choose):
    """The layer token by token; ``choose``: (logits of a token, experts from best to worst) →
    {expert: gate}."""
    y = torch.zeros_like(x)
    for t, token in enumerate(x):
        logits = layer.router.weight @ token
        ranking = sorted(range(E), key=lambda e: -logits[e].item())
        for e, gate in choose(logits, ranking).items():
            hidden = torch.nn.functional.gelu(layer.fc1.weight[e] @ token + layer.fc1.bias[e])
            y[t] += gate * (layer.fc2.weight[e] @ hidden + layer.fc2.bias[e])
    return y


def own(logits, experts):
    return {e: logits.softmax(0)[e] for e in experts}


def kept(logits, ranking, experts):
    return {e: logits.softmax(0)[ranking[k]] for k, e in enumerate(experts)}


BY_HAND = {
    "the router's own choice": (UseRanks(1), lambda z, r: own(z, r[:K])),
    "without the best": (DropBest(), lambda z, r: own(z, r[1 : K + 1])),
    "ranks 3 and 4": (UseRanks(first=3), lambda z, r: own(z, r[2:4])),
    "ranks 3 and 4, kept gates": (UseRanks(first=3, gates="kept"), lambda z, r: kept(z, r, r[2:4])),
    "ranks 3 and 4, uniform": (
        UseRanks(first=3, gates="uniform"),
        lambda z, r: dict.fromkeys(r[2:4], 0.5),
    ),
    "ranks 3 and 4, sum 1": (
        UseRanks(first=3, gates="renormalized"),
        lambda z, r: dict(
            zip(r[2:4], z.softmax(0)[r[2:4]] / z.softmax(0)[r[2:4]].sum(), strict=True)
        ),
    ),
    "the worst": (Lowest(), lambda z, r: own(z, r[-K:])),
    "one expert": (OneExpert(index=3), lambda z, r: own(z, [3])),
    "the average": (AllExperts(), lambda z, r: dict.fromkeys(range(E), 1 / E)),
    "all, as the router weighs": (AllExperts(gates="own"), lambda z, r: own(z, range(E))),
    "permuted": (
        PermuteExperts(permutation=(1, 2, 3, 4, 0)),
        lambda z, r: kept(z, r, [(e + 1) % E for e in r[:K]]),
    ),
    "masked": (
        MaskExperts(experts=(0, 2)),
        lambda z, r: own(
            z.where(torch.tensor([False, True, False, True, True]), -torch.inf),
            [e for e in r if e not in (0, 2)][:K],
        ),
    ),
    "without rank 1": (DropRank(1), lambda z, r: own(z, r[1:K])),
    "without rank 2": (DropRank(2), lambda z, r: own(z, r[:1])),
    "gates of sum 1": (
        RenormalizedGates(),
        lambda z, r: {e: g / z.softmax(0)[r[:K]].sum() for e, g in own(z, r[:K]).items()},
    ),
    "uniform gates": (UniformGates(), lambda z, r: dict.fromkeys(r[:K], 1 / K)),
    "frozen gates": (FrozenGates(), lambda z, r: own(z, r[:K])),
    "two in order": (
        [DropBest(), DropRank(2), UniformGates()],
        lambda z, r: {r[1]: 1.0},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_policy_by_hand(name, layer, x):
    policy, choose = BY_HAND[name]
    with intervene(layer, policy):
        y = layer(x)
    torch.testing.assert_close(y, by_hand(layer, x, choose))


@pytest.mark.parametrize("policy", [UseRanks(1), FrozenGates()])
def test_what_changes_nothing_changes_no_bit(policy, layer, x):
    with intervene(layer, policy):
        y = layer(x)
    assert torch.equal(y, layer(x)) or torch.allclose(y, layer(x), rtol=1e-15)


def test_random_experts(layer, x):
    def drawn(policy):
        with intervene(layer, policy), trace_routing(layer) as trace:
            layer(x)
        return trace.layers[""].experts

    experts = drawn(RandomExperts(seed=1))
    assert all(len(set(row)) == K for row in experts.tolist())
    assert torch.equal(experts, drawn(RandomExperts(seed=1))) and not torch.equal(
        experts, drawn(RandomExperts(seed=2))
    )
    counts = torch.bincount(experts.flatten(), minlength=E)
    assert counts.min() > 0
    among = drawn(RandomExperts(seed=1, among=3))
    best = layer.router(x).logits.argsort(1, descending=True)[:, :3]
    assert (among[:, :, None] == best[:, None]).any(2).all()
    assert not torch.equal(among.long().sort(1).values, best[:, :K].sort(1).values)


def small_vmoe(**options):
    torch.manual_seed(0)
    model = VMoE(
        16, 4, 24, 4, 2, 32, 5, moe_layers=(0, 2, 3), num_experts=4, channels=1, **options
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_only_the_named_layers_and_only_inside_the_block():
    model, images = small_vmoe(), torch.rand(3, 1, 16, 16)
    plain = model(images)
    for layers, steered in (
        ([1], ["blocks.2.mlp"]),
        (["blocks.3.mlp", 0], ["blocks.0.mlp", "blocks.3.mlp"]),
        ([-1], ["blocks.3.mlp"]),
    ):
        with intervene(model, OneExpert(index=1), layers=layers), trace_routing(model) as trace:
            assert not torch.equal(model(images), plain)
        assert [
            name for name, layer in trace.layers.items() if layer.experts.shape[1] == 1
        ] == steered
    with pytest.raises(RuntimeError, match="stop"), intervene(model, DropBest()):
        raise RuntimeError("stop")
    assert torch.equal(model(images), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class TwoLayers(torch.nn.Module):
    """Two layers with one router, and perhaps one capacity."""

    def __init__(self, capacity=None):
        super().__init__()
        router = TopKRouter(D, E, K, dtype=torch.float64)
        self.a, self.b = (
            MoE(D, F, E, K, router=router, capacity=capacity, dtype=torch.float64) for _ in range(2)
        )

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("capacity", [None, Capacity(0.5, multiple_of=1)], ids=str)
def test_layers_that_share_a_router_are_seen_and_steered_apart(capacity, x):
    model = TwoLayers(capacity).eval()
    y = model.a(x)
    with trace_routing(model) as trace:
        plain = model(x)
    for layer, tokens in ((model.a, x), (model.b, y)):
        with trace_routing(layer) as alone:
            layer(tokens)
        seen = trace.layers["a" if layer is model.a else "b"]
        assert torch.equal(seen.logits, alone.layers[""].logits) and torch.equal(
            seen.experts, alone.layers[""].experts
        )
    with intervene(model, OneExpert(index=3)):
        steered = model.b(y)
    with intervene(model, OneExpert(index=3), layers=["b"]), trace_routing(model) as trace:
        assert torch.equal(model.a(x), y)
        assert torch.equal(model(x), steered) and not torch.equal(steered, plain)
    assert trace.layers["b"].experts.unique().tolist() in ([3], [3, E])


def test_a_layer_that_failed_hears_nothing_of_its_routers_other_calls(x):
    model = TwoLayers().eval()
    with trace_routing(model) as trace:
        with pytest.raises(ValueError, match="x must have 6 features"):
            model.a(x[:, :-1])
        model.b(x)
        model.b.router(x)
    assert [len(layer.routings) for layer in trace.layers.values()] == [0, 1]


def test_nested_blocks_apply_the_outer_one_first_and_leave_in_any_order(layer, x):
    with intervene(layer, OneExpert(index=2)), intervene(layer, UniformGates()):
        inner = layer(x)
    torch.testing.assert_close(inner, by_hand(layer, x, lambda z, r: {2: 1.0}))
    outer, second = intervene(layer, DropBest()), intervene(layer, UniformGates())
    outer.__enter__(), second.__enter__()
    outer.__exit__(None, None, None)
    torch.testing.assert_close(
        layer(x), by_hand(layer, x, lambda z, r: dict.fromkeys(r[:K], 1 / K))
    )
    second.__exit__(None, None, None)
    torch.testing.assert_close(layer(x), by_hand(layer, x, lambda z, r: own(z, r[:K])))


@pytest.mark.parametrize("capacity", [None, Capacity(0.6, images_per_group=2)])
def test_replaying_its_own_trace_changes_nothing_and_anothers_does(capacity):
    model = small_vmoe(capacity=capacity)
    clean, other = torch.rand(4, 1, 16, 16), torch.rand(4, 1, 16, 16)
    with trace_routing(model) as trace:
        logits = model(clean)
    with intervene(model, Replay(trace)), trace_routing(model) as again:
        torch.testing.assert_close(model(clean), logits)
        replayed = model(other)
    for name, layer in trace.layers.items():
        assert torch.equal(again.layers[name].experts, torch.cat([layer.experts] * 2))
    assert not torch.allclose(replayed, model(other))
    with intervene(model, Replay(trace, gates="own")):
        torch.testing.assert_close(model(clean), logits)
    with (
        pytest.raises(ValueError, match="must have recorded 34 tokens in blocks"),
        intervene(model, Replay(trace)),
    ):
        model(clean[:2])


def test_gradients_flow_through_own_gates_and_not_through_frozen_ones(layer, x):
    def run(weight, policy):
        with intervene(layer, policy):
            return torch.func.functional_call(layer, {"router.weight": weight}, (x,)).square().sum()

    weight = layer.router.weight.detach().clone().requires_grad_()
    for policy in (
        DropBest(),
        UseRanks(first=3, gates="kept"),
        RenormalizedGates(),
        MaskExperts(experts=(1,)),
        DropRank(1),
    ):
        assert torch.autograd.gradcheck(lambda w, p=policy: run(w, p), weight)
        (grad,) = torch.autograd.grad(run(weight, policy), weight)
        assert grad.abs().sum() > 0
    for policy in (FrozenGates(), UniformGates(), AllExperts()):
        (grad,) = torch.autograd.grad(run(weight, policy), weight, allow_unused=True)
        assert grad is None or not grad.any()


def test_a_capacity_drops_from_what_the_policy_chose(x):
    layer = MoE(D, F, E, 1, capacity=Capacity(places=3), dtype=torch.float64).eval()
    with intervene(layer, OneExpert(index=4)), trace_routing(layer) as trace:
        y = layer(x)
    found = trace.layers[""]
    assert (found.intended.experts == 4).all() and found.kept.sum() == 3 and found.kept[:3].all()
    assert (y[:3] != 0).all() and (y[3:] == 0).all()


def test_expert_choice_can_be_given_other_gates(x):
    layer = MoE(
        D, F, E, router=ExpertChoiceRouter(D, E, 2.0, dtype=torch.float64), dtype=torch.float64
    ).eval()
    plain = layer(x)
    with trace_routing(layer) as trace:
        layer(x)
    assert (trace.layers[""].kept.sum(0) == 16).all()
    with intervene(layer, FrozenGates()):
        torch.testing.assert_close(layer(x), plain)
    with intervene(layer, UniformGates()), trace_routing(layer) as trace:
        assert not torch.allclose(layer(x), plain)
    sums = trace.layers[""].gates.sum(1)
    assert torch.allclose(sums[sums > 0], torch.ones(1, dtype=torch.float64))


def test_a_compiled_model_is_steered_too_and_compiled_again_afterwards(layer, x):
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count)
    plain = compiled(x)
    before = len(compilations)
    with intervene(compiled, DropBest()), trace_routing(compiled) as trace:
        steered = compiled(x)
    torch.testing.assert_close(steered, by_hand(layer, x, BY_HAND["without the best"][1]))
    assert list(trace.layers) == [""] and len(trace.layers[""].experts) == T
    assert torch.equal(compiled(x), plain) and len(compilations) == before
    torch._dynamo.reset()


def test_no_tokens(layer):
    for policy, _ in BY_HAND.values():
        with intervene(layer, policy):
            assert layer(torch.zeros(0, D, dtype=torch.float64)).shape == (0, D)


def test_ties_and_selection_bias():
    """Ranks: the router's choice first, also where a bias made it; ties go to the lower index."""
    router = TopKRouter(1, 4, 2, selection_bias=True, noise_std=0)
    router.weight.data.zero_()
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    layer = MoE(1, 2, 4, 2, router=router).eval()
    for first, expected in ((1, [3, 0]), (2, [0, 1]), (3, [1, 2])):
        with intervene(layer, UseRanks(first=first)), trace_routing(layer) as trace:
            layer(torch.ones(3, 1))
        assert trace.layers[""].experts.tolist() == [expected] * 3


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("patched", [False, True])
def test_hugging_face_models(family, patched):
    transformers = pytest.importorskip("transformers")
    from ironmoe.moe import huggingface

    common = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 32, "head_dim": 8,
    }  # fmt: skip
    name = {"mixtral": "Mixtral", "gpt_oss": "GptOss"}[family]
    config = getattr(transformers, f"{name}Config")(**common)
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if patched:
        huggingface.patch(model)
    ids = torch.randint(0, 32, (2, 7))
    plain = model(ids).logits
    with intervene(model, [DropBest(), UniformGates()]), trace_routing(model) as trace:
        steered = model(ids).logits
    for layer in trace.layers.values():
        ranking = layer.logits.argsort(dim=1, descending=True, stable=True)
        assert torch.equal(layer.experts.long(), ranking[:, 1:3]) and (layer.gates == 0.5).all()
    assert not torch.allclose(steered, plain, atol=1e-3)
    with trace_routing(model) as clean:
        model(ids)
    with intervene(model, Replay(clean)):
        torch.testing.assert_close(model(ids).logits, plain)
    with intervene(model, DropRank(2)), trace_routing(model) as trace:
        model(ids)
    assert not torch.allclose(steered, plain) and all(
        (layer.gates[:, 1] == 0).all() for layer in trace.layers.values()
    )
    with intervene(model, AllExperts()):
        averaged = model(ids).logits
    with intervene(model, PermuteExperts()):
        permuted = model(ids).logits
    assert averaged.isfinite().all() and permuted.isfinite().all()
    with pytest.raises(ValueError, match="does not tell"), intervene(model, DropBest(gates="own")):
        model(ids)
    torch.testing.assert_close(model(ids).logits, plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m, x: intervene(torch.nn.Linear(2, 2), DropBest()).__enter__(),
            "must have MoE layers to steer, got Linear",
        ),
        (lambda m, x: intervene(m, DropBest(), layers=["mlp"]).__enter__(), "layers must be among"),
        (
            lambda m, x: intervene(m, DropBest(), layers=[1]).__enter__(),
            "numbers from -1 to 0, got 1",
        ),
        (lambda m, x: intervene(m, [3]).__enter__(), "policy must be a function"),
        (lambda m, x: steer(m, x, lambda d: d.x), "must return Routing"),
        (
            lambda m, x: steer(m, x, lambda d: Routing(d.routing.gates[:3], d.routing.experts[:3])),
            r"both \(40, K\), got",
        ),
        (
            lambda m, x: steer(m, x, UseRanks(first=5)),
            "first must be from 1 to 4 with 5 experts and top-2, got 5",
        ),
        (lambda m, x: steer(m, x, RandomExperts(among=1)), "among must be from K = 2 to E = 5"),
        (lambda m, x: steer(m, x, OneExpert(index=5)), "index must be from 0 to 4, got 5"),
        (
            lambda m, x: steer(m, x, PermuteExperts(permutation=(0, 1, 2, 3, 3))),
            "permutation must hold 0 … 4 once each",
        ),
        (
            lambda m, x: steer(m, x, MaskExperts(experts=(0, 1, 2, 3))),
            "experts must leave K = 2 of 5, got 4 to mask",
        ),
        (lambda m, x: steer(m, x, MaskExperts(experts=(7,))), "experts must be from 0 to 4, got 7"),
        (lambda m, x: steer(m, x, DropRank(3)), "rank must be from 1 to K = 2, got 3"),
        (
            lambda m, x: steer(m, x, AllExperts(gates="kept")),
            'gates must be "uniform", "own" or "renormalized" for all',
        ),
        (lambda m, x: UseRanks(gates="equal"), "gates must be one of"),
    ],
)
def test_what_is_wrong_is_named(make, message, layer, x):
    with pytest.raises((ValueError, TypeError), match=message):
        make(layer, x)


def steer(layer, x, policy):
    with intervene(layer, policy):
        layer(x)
