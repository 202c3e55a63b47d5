"""Padding is no token: traces, numbers and health of a masked pass are those of the tokens alone,
and no policy brings a masked token back."""

import copy

import pytest
import torch
from torch import nn

from ironmoe.attacks import BatchMates, attack_statistics
from ironmoe.attacks.routing.divergence import RoutingDivergence
from ironmoe.attacks.routing.modes import FrozenRouting, GatesOnly
from ironmoe.kernels import Routing
from ironmoe.moe import (
    Capacity,
    ExpertChoiceRouter,
    MoE,
    RouterHealth,
    RouterOutput,
    TopKRouter,
    intervene,
    routing_change,
    trace_routing,
)
from ironmoe.moe.metrics import (
    boundary_mass,
    dormant_experts,
    image_overlap,
    routing_entropy,
    swap_jump,
)
from ironmoe.moe.policies import (
    AllExperts,
    DropBest,
    FrozenGates,
    Lowest,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    RenormalizedGates,
    Replay,
    SameSum,
    UniformGates,
)

D, F, E, K = 6, 10, 5, 2
B, N, REAL = 3, 7, 4  # images, tokens with padding, tokens without


class Plain(nn.Module):
    """A user's router, which knows no mask."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, dtype=torch.float64))

    def forward(self, x, tokens_per_group=None):
        logits = x @ self.weight.T
        gates, experts = logits.softmax(-1).topk(K)
        return RouterOutput(Routing(gates, experts.to(torch.int32)), logits)


LAYERS = {
    "top-k": {},
    "capacity": {"capacity": Capacity(0.8, images_per_group=1, multiple_of=1)},
    "batch": {"capacity": Capacity(0.8, multiple_of=1)},
    "priority": {"capacity": Capacity(places=2, priority=True)},
    "expert choice": {
        "router": lambda: ExpertChoiceRouter(
            D, E, 1.0, images_per_group=1, multiple_of=1, dtype=torch.float64
        )
    },
    "plain": {"router": Plain},
    "plain, capacity": {"router": Plain, "capacity": Capacity(places=2)},
}


def layer_of(name):
    torch.manual_seed(0)
    options = copy.deepcopy(LAYERS[name])
    if "router" in options:
        options["router"] = options["router"]()
    return MoE(D, F, E, K, dtype=torch.float64, **options).eval()


def padded(x, fill=float("nan")):
    """(B, REAL, D) → (x (B, N, D) with padding here and there, its mask)."""
    rows = ["1101100", "0001111", "1010101"]
    mask = torch.tensor([[bit == "1" for bit in row] for row in rows])
    full = x.new_full((B, N, D), fill)
    full[mask] = x.flatten(0, 1)
    return full, mask


def tokens(seed=1):
    return torch.randn(
        B, REAL, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def traces_of(layer, x, *policies):
    """(trace of the tokens alone, trace of the same with padding, the output at real tokens)."""
    full, mask = padded(x)
    steer = list(policies) or [lambda decision: decision.routing]
    with intervene(layer, steer):
        with trace_routing(layer, keep_inputs=True) as alone:
            right = layer(x)
        with trace_routing(layer, keep_inputs=True) as trace:
            y = layer(full, mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    torch.testing.assert_close(y[mask].view_as(right), right)
    return alone.layers[""], trace.layers[""]


@pytest.mark.parametrize("name", LAYERS)
def test_a_masked_trace_is_that_of_the_tokens_alone(name):
    layer = layer_of(name)
    alone, trace = traces_of(layer, tokens())
    assert torch.equal(trace.experts, alone.experts)
    assert torch.equal(trace.kept, alone.kept)
    assert torch.equal(trace.intended.experts, alone.intended.experts)
    for field in ("gates", "logits", "inputs", "margins"):
        torch.testing.assert_close(getattr(trace, field), getattr(alone, field))
    assert torch.equal(trace.load(), alone.load())
    assert dormant_experts(trace) == dormant_experts(alone)
    assert routing_entropy(trace) == pytest.approx(routing_entropy(alone))
    assert boundary_mass(trace, 0.3) == boundary_mass(alone, 0.3)
    torch.testing.assert_close(swap_jump(layer, trace), swap_jump(layer, alone))
    assert trace.mask.sum() == B * REAL and len(trace.mask) == B * N


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reading", ["realised", "intended", "kept"])
def test_overlaps_of_images_are_those_of_the_tokens_alone(name, reading):
    layer = layer_of(name)
    clean, moved = traces_of(layer, tokens()), traces_of(layer, tokens(2))
    right = image_overlap(clean[0], moved[0], B, reading)
    torch.testing.assert_close(image_overlap(clean[1], moved[1], B, reading), right, equal_nan=True)
    assert routing_change(clean[1], moved[1], reading) == pytest.approx(
        routing_change(clean[0], moved[0], reading)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_health_counts_real_tokens(name):
    layer, x = layer_of(name), tokens()
    health = RouterHealth(layer)
    layer(x)
    right = health.read()
    layer(*padded(x))
    assert health.read() == pytest.approx(right)


@pytest.mark.parametrize("name", LAYERS)
def test_a_pass_with_nothing_but_padding(name):
    layer = layer_of(name)
    nothing = torch.zeros(B, N, dtype=torch.bool)
    with RouterHealth(layer) as health, trace_routing(layer) as trace:
        y = layer(torch.full((B, N, D), float("nan"), dtype=torch.float64), nothing)
    assert not y.any() and health.read() == {}
    assert len(trace.layers[""].gates) == 0 and not trace.layers[""].load().any()


POLICIES = {
    "best dropped": DropBest(),
    "lowest": Lowest(),
    "one": OneExpert(index=3),
    "all": AllExperts(),
    "permuted": PermuteExperts(permutation=(1, 2, 3, 4, 0)),
    "constant": FrozenGates(),
    "sum 1": RenormalizedGates(),
    "equal": UniformGates(),
    "same sum": SameSum(Lowest()),
    "everyone to 0": lambda d: Routing(
        torch.ones_like(d.routing.gates), torch.zeros_like(d.routing.experts)
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["top-k", "capacity", "priority"])
def test_no_policy_brings_a_masked_token_back(policy, name):
    alone, trace = traces_of(layer_of(name), tokens(), POLICIES[policy])
    assert torch.equal(trace.experts, alone.experts)
    torch.testing.assert_close(trace.gates, alone.gates)
    dropped = ~trace.mask
    assert (trace.routings[0].experts[dropped] == E).all()
    assert not trace.routings[0].gates[dropped].any()


def test_random_experts_do_not_depend_on_what_the_padding_holds():
    layer = layer_of("top-k")
    found = []
    for fill in (0.0, 5.0, float("nan")):
        with intervene(layer, RandomExperts(seed=1)), trace_routing(layer) as trace:
            found.append(layer(*padded(tokens(), fill)))
        assert (trace.layers[""].experts < E).all()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", LAYERS)
def test_a_masked_trace_is_replayed_with_and_without_its_padding(name):
    layer, x, other = layer_of(name), tokens(), tokens(2)
    alone, trace = traces_of(layer, x)
    for recorded in (alone, trace):
        again, with_padding = traces_of(layer, other, Replay(recorded))
        for seen in (again, with_padding):
            assert torch.equal(seen.intended.experts, alone.experts)
            torch.testing.assert_close(seen.intended.gates, alone.gates)
    with (
        pytest.raises(ValueError, match="must have recorded 21 tokens"),
        intervene(layer, Replay(trace)),
    ):
        layer(padded(x, 0.0)[0])


class Masked(nn.Module):
    """A model whose images know their padding: a token of zeros."""

    def __init__(self, name):
        super().__init__()
        self.layer = layer_of(name)
        self.head = nn.Linear(D, 3, dtype=torch.float64)

    def forward(self, x):
        mask = x.ne(0).any(-1)
        return self.head(self.layer(x, mask).sum(1))


@pytest.mark.parametrize("mode", [FrozenRouting(), FrozenRouting("fresh"), GatesOnly()], ids=str)
def test_routing_modes_of_a_model_with_padding(mode):
    torch.manual_seed(0)
    model, x = Masked("capacity"), padded(tokens(), 0.0)[0]
    logits = model(x)
    attempts = mode.record(model, x)
    with mode.around(model, attempts):
        torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize("towards", ["away", "weakest", 2])
def test_a_divergence_is_the_mean_over_real_tokens(towards):
    torch.manual_seed(0)
    model, mode = Masked("top-k"), RoutingDivergence(towards=towards)
    terms = []
    for clean, now in (
        (tokens(), tokens(2)),
        (padded(tokens(), 0.0)[0], padded(tokens(2), 0.0)[0]),
    ):
        attempts = {**mode.record(model, clean), "label": torch.zeros(B, dtype=torch.int64)}
        with mode.around(model, attempts) as term:
            model(now)
            terms.append(term())
    torch.testing.assert_close(terms[1], terms[0])


def test_statistics_of_an_attack_leave_padding_out():
    torch.manual_seed(0)
    model, labels = Masked("capacity"), torch.tensor([0, 1, 2])
    valid = torch.tensor([True, False, True])
    alone = attack_statistics(model, tokens(), tokens(2), labels, valid=valid)
    found = attack_statistics(
        model, padded(tokens(), 0.0)[0], padded(tokens(2), 0.0)[0], labels, valid=valid
    )
    assert found.overlap["realised"]["layer"][1] == 2 * REAL
    for reading, layers in alone.overlap.items():
        assert found.overlap[reading]["layer"] == pytest.approx(layers["layer"])


def test_padding_of_a_victim_is_no_dropped_choice():
    torch.manual_seed(0)
    model, labels = Masked("batch"), torch.tensor([0, 1, 2])
    options = {"eps": 0.0, "steps": 1, "bounds": (-9.0, 9.0)}
    alone = BatchMates(model, **options).run(tokens(), labels, [0, 1, 2])
    found = BatchMates(model, **options).run(padded(tokens(), 0.0)[0], labels, [0, 1, 2])
    assert torch.equal(found.drops_before, alone.drops_before) and alone.drops_before.any()


def test_a_mask_of_ones_changes_nothing():
    layer, x = MoE(D, F, E, router=TopKRouter(D, E, K)).eval(), torch.randn(2, 5, D)
    with trace_routing(layer) as plain:
        right = layer(x)
    with trace_routing(layer) as trace:
        assert torch.equal(layer(x, torch.ones(2, 5, dtype=torch.int64)), right)
    assert torch.equal(trace.layers[""].experts, plain.layers[""].experts)


def texts():
    """(five tokens, the same behind three of padding, the attention mask of these)."""
    ids = torch.randint(1, 32, (1, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    return ids, nn.functional.pad(ids, (3, 0)), mask


def mixtral():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).double().train()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_attention_mask_of_a_hugging_face_model_is_that_of_its_layers(patched, checkpointing):
    from ironmoe.moe import huggingface

    model = mixtral()
    ids, padded_ids, mask = texts()
    with trace_routing(model) as alone, RouterHealth(model) as health:
        model(ids)
    right = health.read()

    if patched:
        huggingface.patch(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with trace_routing(model) as trace, RouterHealth(model) as health:
        model(padded_ids, attention_mask=mask).logits[:, 3:].sum().backward()
    assert health.read() == pytest.approx(right)
    for name, layer in trace.layers.items():
        assert torch.equal(layer.experts, alone.layers[name].experts)
        torch.testing.assert_close(layer.gates, alone.layers[name].gates)
        assert layer.mask.tolist() == mask[0].bool().tolist()


@pytest.mark.parametrize("patched", [False, True])
def test_a_steered_hugging_face_model_leaves_its_padding_out(patched):
    from ironmoe.moe import huggingface

    model = mixtral()
    ids, padded_ids, mask = texts()
    if patched:
        huggingface.patch(model)
    with trace_routing(model) as recorded:
        model(ids.flip(1))

    for policy in (OneExpert(index=1), DropBest(), Replay(recorded)):
        with intervene(model, policy):
            right = model(ids).logits
            found = model(padded_ids, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(found, right)
        assert not torch.allclose(right, model(ids).logits)


@pytest.mark.parametrize("patched", [False, True])
def test_a_steered_model_with_padding_has_the_same_gradient_under_checkpointing(patched):
    from ironmoe.moe import huggingface

    model = mixtral()
    _, padded_ids, mask = texts()
    if patched:
        huggingface.patch(model)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with intervene(model, OneExpert(index=1)):
            model(padded_ids, attention_mask=mask).logits[:, 3:].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_trace_with_padding_is_not_replayed_among_other_padding():
    """As many tokens are real, but other ones: an image would get the routing of another."""
    layer, (x, mask) = layer_of("top-k"), padded(tokens(), 0.0)
    with trace_routing(layer) as trace:
        layer(x, mask)
    with intervene(layer, Replay(trace)):
        layer(x, mask)
        with pytest.raises(ValueError, match="trace must have been recorded in '' with the mask"):
            layer(x, mask.flip(0))
        with pytest.raises(ValueError, match="trace must have been recorded in '' with the mask"):
            layer(x[:, :6].repeat(1, 2, 1), torch.arange(12).expand(B, 12) < REAL)
        layer(tokens(), torch.ones(B, REAL, dtype=torch.bool))
        forwards = torch.func.vmap(lambda x, mask: layer(x, mask), (0, None))
        assert forwards(x[None], mask.flip(0)).shape == (1, B, N, D)  # values cannot be read there
