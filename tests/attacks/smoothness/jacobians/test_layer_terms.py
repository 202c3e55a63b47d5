"""The terms of one layer's derivative, against formulas written out by hand."""

import math

import pytest
import torch
from smoothness_models import LinearlyRouted, dense, images_of, vmoe
from torch import nn
from torch.func import jacrev, vmap

from ironmoe.attacks.smoothness.jacobians.layer_terms import _slope_at_0, layer_terms
from ironmoe.attacks.smoothness.jacobians.layer_tokens import LayerTokens, block_of
from ironmoe.kernels import Routing
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, trace_routing
from ironmoe.moe.metrics import boundary_mass, expert_outputs, swap_jump
from ironmoe.moe.routing.routed_layers import routing_sites

wide = {"dtype": torch.float64}
SHARED = {"make_moe": lambda: MoE(12, 16, 4, 2, shared_dim=8, shared_gate=True)}
CASES = {
    "source gates": {}, "renormalised gates": {"router": {"renormalize": True}},
    "one expert": {"top_k": 1}, "all experts": {"top_k": 4}, "shared expert": SHARED,
    "capacity": {"capacity": Capacity(1.0, images_per_group=1, multiple_of=1)},
    "renormalising capacity": {
        "capacity": Capacity(1.0, images_per_group=1, multiple_of=1, renormalize=True)
    },
}  # fmt: skip
LAYER = "blocks.1.mlp"


def traced(model, x, name=LAYER):
    with torch.no_grad(), trace_routing(model, keep_inputs=True) as trace:
        model(x)
    return trace.layers[name]


def tokens_of(model, layer, name=LAYER):
    site = routing_sites(model)[name]
    carried_out = Routing(layer.gates, layer.experts)
    return LayerTokens(
        site, block_of(model, site), layer.inputs, layer.intended, carried_out, layer.logits
    )


def by_hand(moe, layer, renormalised):
    """(expert term, gate term), each (T, D, D): Σ g ∂f and Σ f ∂g over the experts in use."""
    weights = [p.detach() for p in (moe.fc1.weight, moe.fc1.bias, moe.fc2.weight, moe.fc2.bias)]

    def f(x, w_in, b_in, w_out, b_out):
        return w_out @ nn.functional.gelu(w_in @ x + b_in, approximate=approximate) + b_out

    approximate = "tanh" if moe.activation == "gelu_tanh" else "none"
    expert_terms, gate_terms = [], []
    rows = moe.router.weight.detach()
    for x, gates, experts in zip(layer.inputs, layer.gates, layer.experts.long(), strict=True):
        kept = experts < moe.num_experts
        gates, experts = gates[kept], experts[kept]
        own = [weight[experts] for weight in weights]
        slopes = vmap(jacrev(f), (None, 0, 0, 0, 0))(x, *own)
        expert_terms.append((gates[:, None, None] * slopes).sum(0))

        compared = experts if renormalised else torch.arange(moe.num_experts)
        share = (rows[compared] @ x).softmax(0)
        mean = share @ rows[compared]
        outputs = vmap(f, (None, 0, 0, 0, 0))(x, *own)
        gate_terms.append(torch.einsum("k,kc,kd->cd", gates, outputs, rows[experts] - mean))
    return torch.stack(expert_terms), torch.stack(gate_terms)


@pytest.mark.parametrize("case", [name for name in CASES if name != "shared expert"])
def test_expert_term_and_gate_term_are_those_of_the_formula(case):
    model, x = vmoe(**CASES[case]), images_of(6)
    layer = traced(model, x)
    experts, gates = by_hand(model.blocks[1].mlp, layer, "renormalis" in case)
    at = tokens_of(model, layer)
    whole = at.jacobian(constant_gates=False)
    constant = at.jacobian(constant_gates=True)
    torch.testing.assert_close(constant, experts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, experts + gates, rtol=1e-12, atol=1e-12)

    found = layer_terms(model, x, tokens=None)[LAYER]
    assert found.tokens.tolist() == list(range(24))
    for name, term in (("whole", whole), ("experts", experts), ("gates", gates)):
        frobenius, spectral = (
            getattr(found, f"{name}_{kind}") for kind in ("frobenius", "spectral")
        )
        torch.testing.assert_close(frobenius, term.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            spectral, torch.linalg.matrix_norm(term, 2), rtol=1e-9, atol=1e-12
        )
    torch.testing.assert_close(found.gate_sums, layer.gates.sum(1))
    if "capacity" in case:
        assert (layer.experts == 4).any()


def test_a_shared_expert_belongs_to_the_experts_with_its_gate():
    model, x = vmoe(**SHARED), images_of(4)
    moe, layer = model.blocks[1].mlp, traced(model, x)
    experts, gates = by_hand(moe, layer, False)
    shared = vmap(jacrev(lambda x: moe.shared_gate(x).sigmoid() * moe.shared(x)))(layer.inputs)
    at = tokens_of(model, layer)
    torch.testing.assert_close(at.jacobian(constant_gates=True), experts + shared)
    torch.testing.assert_close(at.jacobian(constant_gates=False), experts + shared + gates)


def test_the_jacobian_of_a_layer_is_that_of_finite_differences():
    model, x = vmoe(), images_of(2)
    layer = traced(model, x)
    whole = tokens_of(model, layer).jacobian(constant_gates=False)
    step = 1e-6 * torch.randn(layer.inputs.shape, **wide, generator=torch.manual_seed(0))
    with torch.no_grad():
        up, down = (model.blocks[1].mlp(layer.inputs + sign * step) for sign in (1, -1))
    expected = (whole @ (2 * step)[..., None])[..., 0]
    torch.testing.assert_close(up - down, expected, rtol=1e-6, atol=1e-13)


def test_distances_of_experts_and_jumps():
    model, x = vmoe(top_k=3), images_of(5)
    moe, layer = model.blocks[1].mlp, traced(model, x)
    found = layer_terms(model, x, tokens=None)[LAYER]
    outputs = expert_outputs(moe, layer.inputs)
    torch.testing.assert_close(found.jumps, swap_jump(moe, layer))
    for token in range(len(layer.inputs)):
        own = layer.experts[token].tolist()
        (other,) = set(range(4)) - set(own)
        pairs = [(own[a], own[b]) for a in range(3) for b in range(a)]
        distances = [(outputs[token, a] - outputs[token, b]).norm() for a, b in pairs]
        lengths = [(outputs[token, a].norm() + outputs[token, b].norm()) / 2 for a, b in pairs]
        relative = [d / length for d, length in zip(distances, lengths, strict=True)]
        torch.testing.assert_close(found.chosen_distance[token], sum(distances) / 3)
        torch.testing.assert_close(found.chosen_relative[token], sum(relative) / 3)

        last = own[int(layer.gates[token].argmin())]
        apart = (outputs[token, last] - outputs[token, other]).norm()
        length = (outputs[token, last].norm() + outputs[token, other].norm()) / 2
        torch.testing.assert_close(found.next_distance[token], apart)
        torch.testing.assert_close(found.next_relative[token], apart / length)


def test_equal_experts_have_no_distance_and_no_jump():
    model = LinearlyRouted()
    with torch.no_grad():
        for parameter in (*model.moe.fc1.parameters(), *model.moe.fc2.parameters()):
            parameter.copy_(parameter[:1].expand_as(parameter))
    found = layer_terms(model, images_of(3, 1)[:, 0, 0] * torch.ones(5, **wide))["moe"]
    assert found.chosen_distance.max() < 1e-14 and found.next_relative.max() < 1e-14
    assert found.jumps.max() < 1e-14 and found.gates_frobenius.min() > 0


def test_where_there_is_no_other_expert():
    every = layer_terms(vmoe(top_k=4), images_of(3))[LAYER]
    assert every.next_distance.isnan().all() and (every.jumps == 0).all()
    assert (every.boundary.mass == 0).all() and every.boundary.slope == 0
    single = layer_terms(vmoe(top_k=1), images_of(3))[LAYER]
    assert single.chosen_distance.isnan().all() and single.next_distance.isfinite().all()


def test_the_share_of_tokens_near_a_boundary():
    model, x = vmoe(), images_of(12)
    layer = traced(model, x)
    found = layer_terms(model, x, widths=(0.0, 0.3, 2.0), batch_size=5)[LAYER].boundary
    assert found.widths.tolist() == [0.0, 0.3, 2.0]
    assert found.mass.tolist() == [boundary_mass(layer, width) for width in (0.0, 0.3, 2.0)]
    nearest = layer.margins.sort().values[math.ceil(math.sqrt(48))]  # of 48 tokens, the 8th
    assert found.slope == pytest.approx(7 / (48 * float(nearest)))


def test_the_slope_of_even_margins_is_their_density():
    """The mean over 400 draws of 300 margins, even from 0 to 2, is right within 5 standard
    errors, and each is off by about 1 / √(k − 2), k = 19."""
    generator = torch.Generator().manual_seed(0)
    slopes = [_slope_at_0(2 * torch.rand(300, generator=generator, **wide)) for _ in range(400)]
    slopes = torch.tensor(slopes)
    error = slopes.std() / math.sqrt(400)
    assert abs(slopes.mean() - 0.5) < 5 * error
    assert slopes.std() / 0.5 == pytest.approx(1 / math.sqrt(17), rel=0.2)
    assert math.isnan(_slope_at_0(torch.ones(1))) and _slope_at_0(torch.zeros(4)) == math.inf


def test_a_draw_is_the_same_for_the_same_seed_and_a_part_of_all():
    model, x = vmoe(), images_of(20)
    every = layer_terms(model, x, tokens=None)[LAYER]
    some, same, other = (
        layer_terms(model, x, tokens=9, seed=seed, batch_size=b)[LAYER]
        for seed, b in ((0, 64), (0, 7), (1, 64))
    )
    assert len(some.tokens) == 9 and len(some.gate_sums) == 80
    assert torch.equal(some.tokens, same.tokens) and not torch.equal(some.tokens, other.tokens)
    for name in ("whole_spectral", "gates_frobenius", "next_distance", "jumps"):
        value = getattr(some, name)
        torch.testing.assert_close(value, getattr(every, name)[some.tokens])
        torch.testing.assert_close(value, getattr(same, name))


def test_of_an_ensemble_the_same_tokens_of_every_member_are_drawn():
    model, x = vmoe(ensemble_size=2, num_experts=6), images_of(6)
    layer = traced(model, x)
    found = layer_terms(model, x, tokens=5)[LAYER]
    first, second = found.tokens.view(2, 5)
    assert torch.equal(first + 24, second)
    experts, gates = by_member(model.blocks[1].mlp, layer)
    drawn = found.tokens
    torch.testing.assert_close(found.gates_frobenius, gates[drawn].flatten(1).norm(dim=1))
    torch.testing.assert_close(found.experts_frobenius, experts[drawn].flatten(1).norm(dim=1))


def by_member(moe, layer):
    """``by_hand`` of two members with half of the experts each."""
    terms = []
    for member, rows in enumerate(layer.inputs.chunk(2)):
        own = slice(3 * member, 3 * member + 3)
        part = MoE(12, 16, 3, 2, activation="gelu_tanh").double()
        with torch.no_grad():
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "router.weight"):
                part.get_parameter(name).copy_(moe.get_parameter(name)[own])
        half = traced(nn.Sequential(part).eval(), rows, "0")
        terms.append(by_hand(part, half, False))
    return [torch.cat(both) for both in zip(*terms, strict=True)]


def test_padding_is_no_token():
    model, x = vmoe(), images_of(3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    found = layer_terms(model, x, tokens=None, extra={"mask": mask}, batch_size=2)[LAYER]
    assert len(found.tokens) == len(found.gate_sums) == 7
    with torch.no_grad(), trace_routing(model, keep_inputs=True) as trace:
        model(x, mask)
    experts, _ = by_hand(model.blocks[1].mlp, trace.layers[LAYER], False)
    torch.testing.assert_close(found.experts_frobenius, experts.flatten(1).norm(dim=1))


class StandIn(nn.Module):
    """Experts with the attributes and the call of transformers' interface."""

    def __init__(self, experts, dim):
        super().__init__()
        self.has_gate = self.has_bias = self.is_transposed = self.is_concatenated = False
        self.num_experts, self.config = experts, None
        self.weight = nn.Parameter(torch.randn(experts, dim, dim))

    def forward(self, x, experts, gates):
        outputs = torch.einsum("ecd,td->tec", self.weight, x).tanh()
        return (
            outputs.gather(1, experts[..., None].expand(-1, -1, x.shape[1])) * gates[..., None]
        ).sum(1)


class Block(nn.Module):
    """A block that owns router and experts, as those of transformers do."""

    def __init__(self, dim=4, experts=5, changes=False):
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = StandIn(experts, dim)
        self.changes = changes

    def forward(self, hidden):
        x = hidden.flatten(0, 1)
        gates, experts = self.gate(x).softmax(-1).topk(2)
        x = 2 * x if self.changes else x
        return self.experts(x, experts, gates).view_as(hidden) + hidden.sin(), gates


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.block = block
        self.double()

    def forward(self, x):
        return self.block(x)[0].mean(1)


def test_a_block_of_another_library_is_differentiated_as_a_whole():
    model = Net(Block())
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), **wide)
    found = layer_terms(model, x, tokens=None)["block.experts"]
    rows = x.flatten(0, 1)
    whole = vmap(jacrev(lambda t: model.block(t[None, None])[0][0, 0]))(rows)

    shares = model.block.gate(rows).softmax(-1)
    gates, experts = shares.topk(2)
    outputs = torch.einsum("ecd,td->tec", model.block.experts.weight, rows).tanh()
    own = outputs.gather(1, experts[..., None].expand(-1, -1, 4))
    spans = model.block.gate.weight[experts] - (shares @ model.block.gate.weight)[:, None]
    of_gates = torch.einsum("tk,tkc,tkd->tcd", gates, own, spans)
    torch.testing.assert_close(found.whole_frobenius, whole.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.gates_frobenius, of_gates.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.experts_frobenius, (whole - of_gates).flatten(1).norm(dim=1))
    assert found.boundary is not None and found.next_distance.isfinite().all()


def test_models_without_a_choice_or_an_image_have_no_terms():
    assert layer_terms(dense(), images_of(2)) == {}
    with pytest.raises(TypeError, match=r"must be an nn.Module"):
        layer_terms(lambda x: x.flatten(1), images_of(2))
    assert layer_terms(vmoe(), images_of(0)) == {}
    assert list(layer_terms(vmoe(), images_of(1), layers=[-1])) == [LAYER]


def choosing():
    return {"make_moe": lambda: MoE(
        12, 16, 4, router=ExpertChoiceRouter(12, 4, 1.0, images_per_group=1, multiple_of=1)
    )}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: vmoe(**choosing()), {}, ValueError, "chooses other experts"),
        (lambda: Net(Block(changes=True)), {}, ValueError, "changes the tokens on their way"),
        (vmoe, {"layers": ["head"]}, ValueError, "layers must be among"),
        (vmoe, {"tokens": 0}, ValueError, "tokens must be at least 1"),
        (vmoe, {"widths": (-1.0,)}, ValueError, "widths must be finite and at least 0"),
    ],
)
def test_what_is_wrong_is_named(make, options, error, message):
    model = make()
    x = torch.ones(2, 2, 4, **wide) if isinstance(model, Net) else images_of(2)
    with pytest.raises(error, match=message):
        layer_terms(model, x, **options)
