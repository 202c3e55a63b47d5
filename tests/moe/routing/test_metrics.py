import math

import pytest
import torch

from ironmoe.kernels import Routing
from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    LayerTrace,
    MoE,
    intervene,
    routing_change,
    routing_sites,
    trace_routing,
)
from ironmoe.moe.metrics import (
    boundary_mass,
    dormant_experts,
    entropy,
    expert_cosine,
    expert_distance,
    expert_outputs,
    image_overlap,
    imbalance,
    load_variation,
    margin_histogram,
    routing_entropy,
    swap_jump,
)
from ironmoe.moe.policies import DropRank, OneExpert, UniformGates

D, F, E, K, T = 6, 10, 5, 2, 30


def trace_of(gates, experts, num_experts=4, intended=None, logits=None):
    routing = Routing(torch.tensor(gates), torch.tensor(experts, dtype=torch.int32))
    return LayerTrace(num_experts, [routing], [intended or routing], [logits])


def test_three_readings_of_routing_change():
    """Token 0 keeps one of two, token 1 is dropped both times, token 2 stays, token 3's second gate
    is 0."""
    chosen = [[0, 1], [2, 3], [1, 2], [3, 0]]
    clean = trace_of(
        [[0.5, 0.2], [0.0, 0.0], [0.4, 0.3], [0.6, 0.0]], [[0, 1], [4, 4], [1, 2], [3, 0]],
        intended=Routing(torch.full((4, 2), 0.4), torch.tensor(chosen)),
    )  # fmt: skip
    adversarial = trace_of(
        [[0.5, 0.2], [0.0, 0.0], [0.3, 0.4], [0.6, 0.0]], [[0, 2], [4, 4], [2, 1], [3, 1]],
        intended=Routing(torch.full((4, 2), 0.4), torch.tensor([[0, 2], [2, 3], [2, 1], [3, 1]])),
    )  # fmt: skip
    assert routing_change(clean, adversarial) == pytest.approx(1 - (1 / 3 + 0 + 1 + 1) / 4)
    assert routing_change(clean, adversarial, "kept") == pytest.approx(1 - (1 / 3 + 1 + 1) / 3)
    assert routing_change(clean, adversarial, "intended") == pytest.approx(
        1 - (1 / 3 + 1 + 1 + 1 / 3) / 4
    )
    assert routing_change(clean, clean) == 0.25 and routing_change(clean, clean, "kept") == 0
    with pytest.raises(ValueError, match="reading must be one of"):
        routing_change(clean, clean, "official")
    with pytest.raises(ValueError, match="4 and 3 tokens"):
        routing_change(clean, trace_of([[0.5], [0.5], [0.5]], [[0], [1], [2]]))


def test_image_overlap():
    """Two images of two tokens: token 0 keeps one of two, token 1 both; tokens 2 and 3 are dropped
    both times."""
    gates = [[0.5, 0.2], [0.4, 0.3], [0.0, 0.0], [0.0, 0.0]]
    clean, adversarial = (
        trace_of(gates, [first, [1, 2], [4, 4], [4, 4]]) for first in ([0, 1], [0, 2])
    )
    assert image_overlap(clean, adversarial, 2).tolist() == pytest.approx([(1 / 3 + 1) / 2, 0])
    assert image_overlap(clean, adversarial, 2, "kept").tolist() == pytest.approx(
        [(1 / 3 + 1) / 2, math.nan], nan_ok=True
    )
    for reading in ("realised", "intended"):
        mean = image_overlap(clean, adversarial, 4, reading).mean().item()
        assert 1 - mean == pytest.approx(routing_change(clean, adversarial, reading))
    for images in (0, 3):
        with pytest.raises(
            ValueError, match=f"images must be at least 1 and divide the 4 tokens, got {images}"
        ):
            image_overlap(clean, adversarial, images)


def test_routing_entropy():
    even = torch.eye(4)[:, :3] * 50  # sure tokens, the last one not
    sure = trace_of([[0.9], [0.9], [0.9]], [[0], [1], [2]], num_experts=3, logits=even[:3])
    assert routing_entropy(sure) == pytest.approx((math.log(3), 0), abs=1e-6)
    assert routing_entropy(sure, "gates") == pytest.approx((math.log(3), 0), abs=1e-6)
    alike = trace_of(
        [[0.3, 0.1]] * 2, [[0, 1]] * 2, num_experts=3, logits=even[[3, 3]].to(torch.bfloat16)
    )
    assert routing_entropy(alike) == pytest.approx((math.log(3), math.log(3)))
    each = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert routing_entropy(alike, "gates") == pytest.approx((each, each))
    dropped = trace_of([[0.3, 0.1], [0.0, 0.0]], [[0, 1], [3, 3]], num_experts=3)
    assert routing_entropy(dropped, "gates") == pytest.approx((each, each))
    # an ensemble's
    others = torch.tensor([[1.0, 1.0, -math.inf, -math.inf], [-math.inf, -math.inf, 1.0, 1.0]])
    ensemble = trace_of([[0.5], [0.5]], [[0], [2]], logits=others)
    assert routing_entropy(ensemble) == pytest.approx((math.log(4), math.log(2)))
    with pytest.raises(ValueError, match='of must be "logits" or "gates", got \'experts\''):
        routing_entropy(sure, "experts")


def test_load_numbers():
    layer = trace_of([[0.5, 0.2]] * 4, [[0, 1], [0, 1], [0, 4], [0, 2]])
    torch.testing.assert_close(layer.load(), torch.tensor([4, 2, 1, 0]) / 7)
    assert imbalance(layer.load()) == pytest.approx(16 / 7)
    # of 4, 2, 1, 0: variance 35 / 16, mean 7 / 4
    assert load_variation(layer.load()) == pytest.approx(math.sqrt(35 / 49))
    assert (
        load_variation(torch.tensor([1.0, 0, 0, 0, 0])) == pytest.approx(2)
        and load_variation(torch.ones(5)) == 0
    )
    assert dormant_experts(layer) == [3] and dormant_experts(layer, 0.15) == [2, 3]
    assert entropy(torch.full((8,), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx(
        [0, math.log(2)]
    )
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        dormant_experts(layer, 2)


def test_margins():
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.0], [2.0, 2.0, 2.0, 1.0], [0.0, 5.0, 1.0, 4.0]])
    layer = trace_of([[0.5, 0.2]] * 3, [[0, 1], [0, 1], [1, 3]], logits=logits)
    torch.testing.assert_close(layer.margins, torch.tensor([0.5, 0.0, 3.0]))
    assert margin_histogram(layer, torch.tensor([0, 0.25, 1, 3])).tolist() == [1, 1, 1]
    assert boundary_mass(layer, 0.5) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="edges must be at least two ascending numbers"):
        margin_histogram(layer, torch.tensor([1.0, 0.0]))
    everything = trace_of([[0.25] * 4], [[0, 1, 2, 3]], logits=logits[:1])
    assert everything.margins.tolist() == [math.inf]
    with pytest.raises(ValueError, match="logits are not known"):
        _ = trace_of([[0.5, 0.2]], [[0, 1]]).margins


@pytest.fixture
def layer():
    return MoE(D, F, E, K, dtype=torch.float64).eval()


def test_expert_outputs_are_what_each_expert_alone_gives(layer):
    x = torch.randn(T, D, dtype=torch.float64)
    outputs = expert_outputs(layer, x)
    assert outputs.shape == (T, E, D)
    for e in range(E):
        with intervene(layer, [OneExpert(e), UniformGates()]):
            torch.testing.assert_close(outputs[:, e], layer(x).detach())


def test_distance_and_cosine():
    f = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 0.0]]]).repeat(5, 1, 1)
    distance, cosine = expert_distance(f), expert_cosine(f)
    torch.testing.assert_close(distance[0], torch.tensor([0.0, math.sqrt(2), 2.0, 1.0]))
    torch.testing.assert_close(cosine[0], torch.tensor([1.0, 0.0, -1.0, 1.0]))
    torch.testing.assert_close(distance, distance.T)
    assert expert_distance(torch.zeros(2, 3, 4)).isfinite().all()


def test_swap_jump_is_the_discontinuity_of_the_layer(layer):
    """Walk to the point where two experts tie: the layer's outputs on both sides of it differ by
    the jump."""
    torch.manual_seed(3)
    ends = torch.randn(2, D, dtype=torch.float64)

    def chosen(x):
        return set(layer.router(x[None]).routing.experts[0].tolist())

    while chosen(ends[0]) == chosen(ends[1]) or len(chosen(ends[0]) & chosen(ends[1])) < K - 1:
        ends = torch.randn(2, D, dtype=torch.float64)
    low, high = ends
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chosen(middle) == chosen(low) else (low, middle)
    if len(chosen(low) & chosen(high)) < K - 1:
        pytest.skip("two swaps at one point")
    step = (layer(low[None]) - layer(high[None])).norm()
    with trace_routing(layer, keep_inputs=True) as trace:
        layer(low[None])
    jump = swap_jump(layer, trace.layers[""])
    torch.testing.assert_close(jump[0], step.detach(), rtol=1e-6, atol=1e-9)
    assert step > 1e-3
    everyone = MoE(D, F, E, E, dtype=torch.float64).eval()
    with trace_routing(everyone, keep_inputs=True) as trace:
        everyone(ends)
    assert swap_jump(everyone, trace.layers[""]).tolist() == [0, 0]


def test_swap_jump_where_choices_were_dropped(layer):
    """A token's last expert is then the one of rank 1; a token that lost both jumps nowhere."""
    x = torch.randn(T, D, dtype=torch.float64)

    def lose(decision):
        gates_TK, experts_TK = DropRank(2)(decision)
        return Routing(
            gates_TK.index_fill(0, torch.tensor([0]), 0),
            experts_TK.index_fill(0, torch.tensor([0]), E),
        )

    with intervene(layer, lose), trace_routing(layer, keep_inputs=True) as trace:
        layer(x)
    jump, outputs, logits = (
        swap_jump(layer, trace.layers[""]),
        expert_outputs(layer, x),
        layer.router(x).logits.detach(),
    )
    best = logits.argsort(1, descending=True)
    assert jump[0] == 0 and (jump[1:] > 0).all()
    for t in range(1, T):
        expected = (
            logits[t].softmax(0)[best[t, 0]]
            * (outputs[t, best[t, 0]] - outputs[t, best[t, 1]]).norm()
        )
        torch.testing.assert_close(jump[t], expected)


def test_swap_jump_stays_within_a_member():
    router = EnsembleRouter(D, 4, 1, ensemble_size=2, dtype=torch.float64)
    layer = MoE(D, F, 4, 1, router=router, dtype=torch.float64).eval()
    x = torch.randn(6, D, dtype=torch.float64)
    with trace_routing(layer, keep_inputs=True) as trace:
        layer(x)
    outputs, gates = expert_outputs(layer, x), trace.layers[""].gates[:, 0]
    apart = torch.cat([outputs[:3, 0] - outputs[:3, 1], outputs[3:, 2] - outputs[3:, 3]]).norm(
        dim=1
    )
    torch.testing.assert_close(swap_jump(layer, trace.layers[""]), gates * apart)
    full = MoE(
        D,
        F,
        4,
        2,
        router=EnsembleRouter(D, 4, 2, ensemble_size=2, dtype=torch.float64),
        dtype=torch.float64,
    ).eval()
    with trace_routing(full, keep_inputs=True) as trace:
        full(x)
    assert swap_jump(full, trace.layers[""]).tolist() == [0] * 6  # no other expert


def test_traces_know_what_was_kept_and_keep_graphs_and_inputs_if_asked():
    layer = MoE(D, F, E, K, capacity=Capacity(0.5, multiple_of=1)).eval()
    x = torch.randn(T, D)
    with trace_routing(layer) as trace:
        layer(x)
    found = trace.layers[""]
    assert not found.kept.all() and torch.equal(found.kept, found.gates > 0)
    assert (found.intended.experts < E).all() and not found.gates.requires_grad
    assert torch.equal(found.gates[found.kept], found.intended.gates[found.kept])
    assert found.load().sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="keep_inputs=True"):
        _ = found.inputs
    with trace_routing(layer, keep_graph=True, keep_inputs=True) as trace:
        layer(x)
    found = trace.layers[""]
    assert torch.equal(found.inputs, x)
    (grad,) = torch.autograd.grad(found.margins.sum() + found.gates.sum(), layer.router.weight)
    assert grad.abs().sum() > 0


def test_hugging_face_experts_have_outputs_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4, vocab_size=32, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = transformers.MixtralForCausalLM(config).eval()
    with trace_routing(model, keep_inputs=True) as trace, torch.no_grad():
        model(torch.randint(0, 32, (2, 5)))
    (name,) = trace.layers
    experts, x = routing_sites(model)[name].module, trace.layers[name].inputs
    outputs = expert_outputs(experts, x)
    gate, up = (x @ experts.gate_up_proj[2].T).chunk(2, -1)
    torch.testing.assert_close(
        outputs[:, 2], (torch.nn.functional.silu(gate) * up) @ experts.down_proj[2].T
    )
    jump = swap_jump(experts, trace.layers[name])
    assert jump.shape == (10,) and (jump > 0).all()
    assert expert_distance(outputs).diagonal().abs().max() < 1e-6
    with intervene(model, OneExpert(0)):  # what each expert gives, not what a policy makes of it
        torch.testing.assert_close(expert_outputs(experts, x), outputs)
    with pytest.raises(
        TypeError,
        match="module must be an MoE or the Experts of a Hugging Face model, got "
        "MixtralForCausalLM",
    ):
        expert_outputs(model, x)
    with pytest.raises(
        ValueError, match=r"x must have shape \(tokens, features\), got \(2, 5, 16\)"
    ):
        expert_outputs(experts, x.view(2, 5, 16))
