"""Policies where routing is no plain top-k: Expert Choice, ensembles, choices lost on the way."""

import pytest
import torch

from ironmoe.kernels import Routing
from ironmoe.moe import (
    EnsembleRouter,
    ExpertChoiceRouter,
    MoE,
    TopKRouter,
    intervene,
    trace_routing,
)
from ironmoe.moe.policies import (
    AllExperts,
    DropBest,
    DropRank,
    Lowest,
    MaskExperts,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    Replay,
    SameSum,
    UniformGates,
    UseRanks,
)

D, F, E, K, T, M = 6, 10, 8, 2, 40, 2
wide = {"dtype": torch.float64}


@pytest.fixture
def layer():
    return MoE(D, F, E, K, **wide).eval()


@pytest.fixture
def x():
    return torch.randn(T, D, **wide)


def steered(layer, x, policy):
    """(output, [{expert: gate} of each token], the trace) under the policy."""
    with intervene(layer, policy), trace_routing(layer) as trace:
        y = layer(x)
    found = trace.layers[""]
    rows = zip(found.experts.tolist(), found.gates.tolist(), strict=True)
    return y, [{e: gate for e, gate in zip(*row, strict=True) if e < E} for row in rows], found


def test_ranks_under_expert_choice_are_those_of_the_experts_a_token_has(x):
    layer = MoE(D, F, E, router=ExpertChoiceRouter(D, E, 1.0, **wide), **wide).eval()
    plain, had, _ = steered(layer, x, [])
    assert {len(gates) for gates in had} >= {0, 1, 2}
    best_first = [sorted(gates, key=lambda e, gates=gates: -gates[e]) for gates in had]
    logits = layer.router(x).logits
    others = [
        [e for e in row.argsort(descending=True).tolist() if e not in gates]
        for row, gates in zip(logits, had, strict=True)
    ]

    y, same, _ = steered(layer, x, UseRanks(1))
    assert same == had
    torch.testing.assert_close(y, plain)
    _, found, _ = steered(layer, x, DropRank(1))
    assert found == [{e: had[t][e] for e in best_first[t][1:]} for t in range(T)]
    _, found, _ = steered(layer, x, DropBest())  # kept gates, rank by rank
    for t in range(T):
        ranks = (best_first[t] + others[t])[1 : len(had[t]) + 1]
        assert found[t] == dict(zip(ranks, [had[t][e] for e in best_first[t]], strict=True))
    for policy in (
        Lowest(),
        RandomExperts(),
        RandomExperts(among=E),
        MaskExperts((0, 3)),
        PermuteExperts(),
        SameSum(AllExperts()),
    ):
        _, found, _ = steered(layer, x, policy)
        if not isinstance(policy, SameSum):
            assert [len(gates) for gates in found] == [len(gates) for gates in had]
        for now, before in zip(found, had, strict=True):
            assert sum(now.values()) == pytest.approx(sum(before.values()))
    with pytest.raises(ValueError, match=r"first must be .*: too few experts for"):
        steered(layer, x, UseRanks(E))


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"renormalize": True},
        {"order": "topk_first"},
        {"score": "sqrtsoftplus", "renormalize": True},
    ],
)
def test_tokens_of_an_ensemble_stay_with_the_experts_of_their_member(x, rule):
    layer = MoE(
        D, F, E, K, router=EnsembleRouter(D, E, K, ensemble_size=M, **rule, **wide), **wide
    ).eval()
    member_T = torch.arange(T) // (T // M)
    policies = [
        DropBest(), UseRanks(3), Lowest(), RandomExperts(), RandomExperts(among=4), AllExperts(),
        AllExperts(gates="own"),
        PermuteExperts(), PermuteExperts((3, 2, 1, 0, 5, 6, 7, 4)), MaskExperts((0, 7)),
        [DropRank(1), DropBest()],
    ]  # fmt: skip
    for policy in policies:
        y, found, trace = steered(layer, x, policy)
        own_TK = trace.experts // (E // M) == member_T[:, None]
        assert (own_TK | ~trace.kept).all() and ((trace.gates > 0) == trace.kept).all(), policy
        assert len({len(gates) for gates in found}) == 1 and y.isfinite().all()
        if (
            "score" not in rule and rule and not isinstance(policy, PermuteExperts)
        ):  # these share 1; permuted ones keep their gates
            torch.testing.assert_close(trace.gates.sum(1), torch.ones(T, **wide))
        if y.requires_grad:
            weight = layer.router.weight
            (grad,) = torch.autograd.grad(y.square().sum(), weight, allow_unused=True)
            assert grad is None or grad.isfinite().all(), policy
    for policy in (OneExpert(1), PermuteExperts(tuple(range(E))[::-1])):
        with pytest.raises(ValueError, match=r"finite logit, .* for \d+ of 40 tokens"):
            steered(layer, x, policy)
    with pytest.raises(
        ValueError, match=r"first must be from 1 .* too few experts for 40 of 40 tokens"
    ):
        steered(layer, x, UseRanks(4))
    _, _, trace = steered(MoE(D, F, E, K, **wide).eval(), x, [])
    with pytest.raises(ValueError, match="finite logit"):
        steered(layer, x, Replay(trace))


def test_a_random_permutation_sends_the_tokens_of_an_expert_to_one_other(x):
    layers = [
        MoE(D, F, E, K, router=r, **wide).eval()
        for r in (None, EnsembleRouter(D, E, K, ensemble_size=M, **wide))
    ]
    for layer in layers:
        before, after = (
            steered(layer, x, policy)[2].experts for policy in ([], PermuteExperts(seed=3))
        )
        sent = {e: set(after[before == e].tolist()) for e in range(E)}
        assert all(len(to) <= 1 for to in sent.values()) and not torch.equal(before, after)
        assert len(set.union(*sent.values())) == sum(map(len, sent.values()))


def test_dropped_choices_have_no_part_in_own_gates(x):
    """One of two choices is lost, so the rule gives the expert that comes in its place the whole
    sum."""
    for rule in ({"renormalize": True}, {"order": "topk_first"}, {"renormalize": 2.0}):
        layer = MoE(D, F, E, K, router=TopKRouter(D, E, K, **rule, **wide), **wide).eval()
        y, found, _ = steered(layer, x, [DropRank(1), UseRanks(2)])
        assert [list(gates.values()) for gates in found] == [[pytest.approx(1)]] * T
        (grad,) = torch.autograd.grad(y.square().sum(), layer.router.weight)
        assert grad.isfinite().all()


def test_gradients_of_each_image_pass_through_vmap(layer):
    images = torch.randn(3, 5, D, **wide)
    weights = dict(layer.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(layer, weights, (image,)).square().sum()

    for policy in (
        DropBest(),
        Lowest(),
        MaskExperts((1,)),
        DropRank(1),
        AllExperts(gates="own"),
        SameSum(OneExpert(2)),
    ):
        with intervene(layer, policy):
            each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
            (whole,) = torch.autograd.grad(
                sum(loss(weights, image) for image in images), layer.fc1.weight
            )
        torch.testing.assert_close(each["fc1.weight"].sum(0), whole)


def test_same_sum(layer, x):
    _, had, plain = steered(layer, x, [])
    before, (_, ranks_3, _) = plain.gates.sum(1), steered(layer, x, UseRanks(3))
    _, found, trace = steered(layer, x, SameSum(UseRanks(3)))
    torch.testing.assert_close(trace.gates.sum(1), before)
    for now, unscaled, gates in zip(found, ranks_3, had, strict=True):
        factor = sum(gates.values()) / sum(unscaled.values())
        assert (
            now == {e: pytest.approx(gate * factor) for e, gate in unscaled.items()} and factor > 1
        )
    _, found, _ = steered(layer, x, SameSum(OneExpert(2)))
    assert found == [{2: pytest.approx(sum(gates.values()))} for gates in had]
    y, _, trace = steered(layer, x, [UniformGates(), SameSum(DropRank(1))])
    assert (trace.gates.sum(1) == 1).all()
    (grad,) = torch.autograd.grad(y.sum(), layer.router.weight, allow_unused=True)
    assert grad is None or not grad.any()

    def run(weight):
        with intervene(layer, SameSum(DropBest())):
            return torch.func.functional_call(layer, {"router.weight": weight}, (x,)).square().sum()

    assert torch.autograd.gradcheck(run, layer.router.weight.detach().clone().requires_grad_())
    alone = MoE(D, F, E, 1, router=TopKRouter(D, E, 1, scale=16.0)).eval()
    y, _, trace = steered(alone, x.float(), SameSum(DropRank(1)))
    assert (trace.gates == 0).all() and (y == 0).all()
    with pytest.raises(
        TypeError, match="policy must be a function from Decision to Routing, got int"
    ):
        SameSum(3)


def test_a_policy_returns_a_routing_of_float_gates_and_integer_experts(layer, x):
    def returning(make):
        return lambda decision: make(*decision.routing)

    for make, message in (
        (
            lambda gates, experts: (gates, experts),
            r"must return Routing\(gates, experts\) of two tensors, got tuple",
        ),
        (lambda gates, experts: Routing(gates, experts.tolist()), "of two tensors"),
        (
            lambda gates, experts: Routing(experts, experts),
            "float gates and integer experts, got torch.int32",
        ),
        (
            lambda gates, experts: Routing(gates, gates),
            "float gates and integer experts, got torch.float64 and torch.float64",
        ),
        (lambda gates, experts: Routing(gates, experts > 0), "and torch.bool"),
    ):
        with pytest.raises(TypeError, match=message):
            steered(layer, x, returning(make))
    for shift in (-1, 8):
        with pytest.raises(ValueError, match=r"must return experts from 0 to 8 \(dropped\), got"):
            steered(
                layer,
                x,
                returning(lambda gates, experts, shift=shift: Routing(gates, experts + shift)),
            )
    y, _, trace = steered(
        layer, x, returning(lambda gates, experts: Routing(gates, experts.long()))
    )
    assert trace.experts.dtype == torch.int32
    torch.testing.assert_close(y, layer(x))
    with pytest.raises(
        TypeError, match="layers must be a sequence of names or numbers, or None, got 0"
    ):
        intervene(layer, DropBest(), layers=0).__enter__()


def test_random_experts_among_none_at_all_is_an_error_and_places_alone_decide(layer, x):
    with pytest.raises(ValueError, match="among must be from K = 2 to E = 8 or None, got 0"):
        steered(layer, x, RandomExperts(among=0))
    whole, part = (
        steered(layer, tokens, RandomExperts(seed=1))[2].experts for tokens in (x, x[:7])
    )
    assert torch.equal(whole[:7], part)


def test_replaying_one_layers_trace(layer, x):
    y, _, trace = steered(layer, x, UseRanks(2))
    torch.testing.assert_close(steered(layer, x, Replay(trace))[0], y)
    first_lost = Routing(trace.gates.clone(), trace.experts.clone())
    first_lost.gates[:, 0], first_lost.experts[:, 0] = 0, E
    trace.routings = [first_lost]
    _, had, _ = steered(layer, x, [])
    # the only expert left gets the gate of rank 1
    _, found, _ = steered(layer, x, Replay(trace, gates="kept"))
    assert found == [
        {e: max(gates.values())}
        for gates, e in zip(had, first_lost.experts[:, 1].tolist(), strict=True)
    ]
    with pytest.raises(
        ValueError, match=r"must have recorded 40 tokens in .* and 4 experts, got 40 and 8"
    ):
        steered(MoE(D, F, 4, K, **wide).eval(), x, Replay(trace))
