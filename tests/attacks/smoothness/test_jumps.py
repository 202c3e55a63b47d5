"""The jump of a swap: two forced forward passes against formulas and against the free model."""

import pytest
import torch
from smoothness_models import LinearlyRouted, images_of, vmoe
from torch import nn

from ironmoe.attacks.smoothness import nearest_swaps, swap_jumps
from ironmoe.kernels import Routing
from ironmoe.moe import Capacity, MoE, intervene, trace_routing
from ironmoe.moe.metrics import expert_outputs
from ironmoe.moe.metrics import swap_jump as jump_of_layer

wide = {"dtype": torch.float64}
PAIR = ("leaving", "coming")
LIMITED = Capacity(0.75, images_per_group=1, multiple_of=1)


def points(count=6, pixels=5, seed=1):
    return torch.rand(count, pixels, generator=torch.Generator().manual_seed(seed), **wide)


class TwoLayers(LinearlyRouted):
    """A second MoE layer after the first, so that a swap changes what later routers see."""

    def __init__(self, capacity=None, **options):
        super().__init__(**options)
        self.moe.capacity = capacity
        self.second = MoE(6, 8, 4, 2, capacity=capacity).double().eval()
        with torch.no_grad():
            self.second.router.weight.mul_(5)

    def forward(self, x):
        tokens = self.stem(x.flatten(1)).unflatten(1, (self.tokens, 6))
        tokens = tokens + self.moe(tokens)
        return self.head((tokens + self.second(tokens)).mean(1))


def at_the_swap(model, x):
    """(swaps, what the layer recorded at the swap of each image, the row of its token)."""
    swaps = nearest_swaps(model, x, pairs="all", layers=["moe"])
    with trace_routing(model, keep_inputs=True) as trace:
        model(x + swaps.steps)
    rows = torch.arange(len(x)) * model.tokens + swaps.token
    return swaps, trace.layers["moe"], rows


def pair_of(swaps):
    layer = swaps.layers["moe"]
    token = swaps.token[:, None]
    return layer.leaving.gather(1, token)[:, 0], layer.coming.gather(1, token)[:, 0]


def test_at_a_tie_the_layer_jumps_by_the_gate_times_the_distance_of_the_experts():
    model, x = LinearlyRouted(), points()
    swaps, layer, rows = at_the_swap(model, x)
    jumps = swap_jumps(model, x + swaps.steps, swaps)

    leaving, coming = pair_of(swaps)
    outputs = expert_outputs(model.moe, layer.inputs)[rows]
    gates = layer.logits[rows].softmax(-1)
    both = [each[:, None] for each in (leaving, coming)]
    torch.testing.assert_close(gates.gather(1, both[0]), gates.gather(1, both[1]))
    images = torch.arange(len(x))
    change = outputs[images, coming] - outputs[images, leaving]
    expected = gates.gather(1, both[0]) * change
    torch.testing.assert_close(jumps.layer_outputs, expected.norm(dim=1).detach())
    torch.testing.assert_close(jumps.layer_outputs, jump_of_layer(model.moe, layer)[rows].detach())
    of_logits = expected @ model.head.weight.T / model.tokens
    torch.testing.assert_close(jumps.logits, of_logits.norm(dim=1).detach())
    assert jumps.swapped.all() and (jumps.logits > 0).all()


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_renormalised_gates_are_those_of_the_new_set(place):
    """The jump is Σ g′ f over the new set minus Σ g f over the old one."""
    model, x = LinearlyRouted(renormalize=True), points()
    swaps, _, rows = at_the_swap(model, x)
    at = x + place * swaps.steps
    with trace_routing(model, keep_inputs=True) as trace:
        model(at)
    layer = trace.layers["moe"]
    outputs = expert_outputs(model.moe, layer.inputs)[rows]
    leaving, coming = pair_of(swaps)
    with trace_routing(model) as trace:
        model(x)
    own = trace.layers["moe"].experts[rows].long()
    other = torch.where(own == leaving[:, None], coming[:, None], own)

    def mixture(experts):
        gates = layer.logits[rows].gather(1, experts).softmax(-1)
        return (gates[..., None] * outputs.gather(1, experts[..., None].expand(-1, -1, 6))).sum(1)

    expected = (mixture(other) - mixture(own)).norm(dim=1).detach()
    torch.testing.assert_close(swap_jumps(model, at, swaps).layer_outputs, expected)
    # At the tie the new set has the gates of the old one; before it, all of them differ.
    by_formula = jump_of_layer(model.moe, layer)[rows]
    assert torch.allclose(expected, by_formula, rtol=1e-9) == (place == 1)


@pytest.mark.parametrize("options", [{}, {"renormalize": True}, {"capacity": LIMITED}])
def test_the_free_model_jumps_as_the_forced_one(options):
    """Just behind the swap minus just before it, with everything that later layers make of it."""
    model, x = TwoLayers(**options), points(8)
    swaps = nearest_swaps(model, x, layers=["moe"], pairs="all")
    share = 1e-8
    with trace_routing(model) as trace:
        behind, before = (model(x + (1 + sign * share) * swaps.steps) for sign in (1, -1))
    later = trace.layers["second"]
    assert not torch.equal(later.experts[:24], later.experts[24:])  # a later layer routes anew
    if options.get("capacity"):
        assert not later.kept.all()

    jumps = swap_jumps(model, x + swaps.steps, swaps, labels=torch.zeros(8, dtype=torch.int64))
    expected = (behind - before).norm(dim=1).detach()
    torch.testing.assert_close(jumps.logits, expected, rtol=1e-5, atol=0)
    margins = [z[:, 0] - z[:, 1:].amax(1) for z in (behind, before)]
    torch.testing.assert_close(
        jumps.margins, (margins[0] - margins[1]).detach(), rtol=1e-5, atol=1e-9
    )
    assert len(set(jumps.margins.sign().tolist())) == 2


@pytest.mark.parametrize(
    "options", [{}, {"ensemble_size": 2, "num_experts": 6}, {"capacity": LIMITED}]
)
def test_a_batch_forces_in_each_image_its_own_layer_and_token(options):
    model, x = vmoe(**options), images_of(6)
    swaps = nearest_swaps(model, x)
    assert len(set(swaps.token.tolist())) > 1
    if "ensemble_size" not in options:
        assert len(set(swaps.layer.tolist())) == 2
    jumps = swap_jumps(model, x, swaps)
    in_parts = swap_jumps(model, x, swaps, batch_size=4)
    for image in range(6):
        name = list(swaps.layers)[swaps.layer[image]]
        token = int(swaps.token[image])
        layer = swaps.layers[name]
        leaving, coming = int(layer.leaving[image, token]), int(layer.coming[image, token])
        router = model.get_submodule(name).router

        def force(decision, token=token, leaving=leaving, coming=coming, router=router):
            experts = decision.routing.experts.clone()
            experts[token] = experts[token].masked_fill(experts[token] == leaving, coming)
            return Routing(router.gates_of(decision.logits, experts), experts)

        alone = x[image : image + 1]
        with intervene(model, force, layers=[name]):
            forced = model(alone)
        torch.testing.assert_close(jumps.logits[image], (forced - model(alone)).norm().detach())
        of_token = swap_jumps(model, x, swaps, (name, token))
        torch.testing.assert_close(of_token.logits[image], jumps.logits[image])
    torch.testing.assert_close(in_parts.logits, jumps.logits)
    torch.testing.assert_close(in_parts.layer_outputs, jumps.layer_outputs)


def test_images_without_a_swap_do_not_jump():
    x = images_of(3)
    every = vmoe(top_k=4)
    for which in ("nearest", ("blocks.1.mlp", 2)):
        jumps = swap_jumps(every, x, nearest_swaps(every, x), which)
        assert not jumps.swapped.any() and not jumps.logits.any() and not jumps.layer_outputs.any()

    model, mask = vmoe(), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    swaps = nearest_swaps(model, x, extra=mask)
    jumps = swap_jumps(model, x, swaps, ("blocks.1.mlp", 3), extra=mask)
    assert jumps.swapped.tolist() == [True, False, True]
    assert (jumps.logits > 0).tolist() == jumps.swapped.tolist()
    assert repr(jumps).startswith("SwapJumps(2 of 3 images, median of the logits 0.")


def test_swaps_of_other_images_are_refused():
    model, x = vmoe(), images_of(3)
    swaps = nearest_swaps(model, x, tokens=[1])
    with pytest.raises(ValueError, match="those of the 2 images of x, got swaps of 3"):
        swap_jumps(model, x[:2], swaps)
    with pytest.raises(ValueError, match=r"got \('blocks.0.mlp', 0\)"):
        swap_jumps(model, x, swaps, ("blocks.0.mlp", 0))
    with pytest.raises(ValueError, match="got 'farthest'"):
        swap_jumps(model, x, swaps, "farthest")
    with pytest.raises(ValueError, match="got 3"):
        swap_jumps(model, x, swaps, 3)
    for labels in (torch.zeros(3), [0, 0, 0], torch.zeros(2).long(), torch.zeros(3).int()):
        with pytest.raises(TypeError, match=r"labels must be an int64 tensor \(3,\)"):
            swap_jumps(model, x, swaps, labels=labels)
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"labels must be from 0 to 2, got {label}"):
            swap_jumps(model, x, swaps, labels=torch.full((3,), label))


def test_swaps_of_another_model_are_refused():
    model, x = vmoe(), images_of(3)
    swaps = nearest_swaps(model, x)
    with pytest.raises(ValueError, match=r"swaps must be those of model, got layers that it lacks"):
        swap_jumps(vmoe(moe_layers=(0,)), x, swaps)
    for layer in swaps.layers.values():
        layer.coming.fill_(5)
    with pytest.raises(ValueError, match=r"expert 5 in .* which has 4 tokens an image and 4 expe"):
        swap_jumps(model, x, swaps)
    with pytest.raises(TypeError, match=r"must be an nn.Module"):
        swap_jumps(model.forward, x, swaps)


def test_a_token_that_is_routed_otherwise_is_not_forced():
    """At other images a token may have neither of the two experts, or both."""
    model, x = vmoe(), images_of(8)
    swaps = nearest_swaps(model, x, pairs="next")
    other = images_of(8, seed=5)
    jumps = swap_jumps(model, other, swaps)
    with trace_routing(model) as trace:
        model(other)
    for image in range(8):
        name = list(swaps.layers)[swaps.layer[image]]
        token = int(swaps.token[image])
        pair = {int(getattr(swaps.layers[name], which)[image, token]) for which in PAIR}
        has = set(trace.layers[name].experts.view(8, 4, 2)[image, token].tolist())
        assert bool(jumps.logits[image].isnan()) == (len(pair & has) != 1)
    lost = int(jumps.logits.isnan().sum())
    assert 0 < lost < 8 and repr(jumps).endswith(f", {lost} not forced)")
    assert torch.equal(jumps.logits.isnan(), jumps.layer_outputs.isnan())
    assert torch.equal(jumps.logits.isnan(), jumps.margins.isnan())


def test_the_model_keeps_no_hook():
    model, x = vmoe().train(), images_of(2)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    swap_jumps(model, x, nearest_swaps(model, x))
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(isinstance(m, nn.Module) and m.training for m in model.modules())
