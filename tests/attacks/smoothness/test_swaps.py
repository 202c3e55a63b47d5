"""The nearest changes of routing: their distances, and that they are made there and not before."""

from itertools import product

import pytest
import torch
from smoothness_models import LinearlyRouted, dense, images_of, vmoe

from ironmoe.attacks.smoothness import boundary_profile, nearest_swaps, swap_jumps
from ironmoe.kernels import ExpertGroups
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, TopKRouter, intervene, trace_routing

DUAL = {"Linf": 1, "L2": 2, "L1": float("inf")}
wide = {"dtype": torch.float64}


def points(count=6, pixels=5, seed=1):
    return torch.rand(count, pixels, generator=torch.Generator().manual_seed(seed), **wide)


def experts(model, x, name="moe"):
    """(B, N, K) the experts of each token, in ascending order."""
    with trace_routing(model) as trace:
        model(x)
    return trace.layers[name].intended.experts.view(len(x), -1, 2).sort(-1).values


def closed_form(model, x, norm, pairs):
    """(B, N) min of gap / ‖its gradient‖ over pairs, of a model whose logits are linear in the
    image."""
    tokens, width = model.tokens, 6
    router = model.moe.router.weight.detach()
    logits = model.stem(x).unflatten(1, (tokens, width)).detach() @ router.T
    slopes = torch.einsum("ed,ndp->nep", router, model.stem.weight.detach().view(tokens, width, -1))
    order = logits.argsort(-1, descending=True)
    distances = torch.empty(len(x), tokens, **wide)
    for image in range(len(x)):
        for token in range(tokens):
            ranked = order[image, token].tolist()
            swaps = [(ranked[1], ranked[2])] if pairs == "next" else product(ranked[:2], ranked[2:])
            distances[image, token] = min(
                (logits[image, token, one] - logits[image, token, other])
                / (slopes[token, one] - slopes[token, other]).norm(DUAL[norm])
                for one, other in swaps
            )
    return distances


@pytest.mark.parametrize("pairs", ["next", "all"])
@pytest.mark.parametrize("norm", DUAL)
def test_with_linear_logits_distances_have_a_closed_form(norm, pairs):
    model, x = LinearlyRouted(), points()
    swaps = nearest_swaps(model, x, norm=norm, pairs=pairs)
    layer = swaps.layers["moe"]
    torch.testing.assert_close(layer.distances, closed_form(model, x, norm, pairs))
    torch.testing.assert_close(swaps.nearest, layer.distances.amin(1))
    assert torch.equal(swaps.token, layer.distances.argmin(1))
    assert torch.equal(swaps.layer, torch.zeros_like(swaps.token))
    lengths = swaps.steps.norm({"Linf": float("inf"), "L2": 2, "L1": 1}[norm], dim=1)
    torch.testing.assert_close(lengths, swaps.nearest)


@pytest.mark.parametrize("norm", DUAL)
def test_with_linear_logits_the_swap_is_made_at_the_distance_and_not_before(norm):
    model, x = LinearlyRouted(), points()
    swaps = nearest_swaps(model, x, norm=norm, pairs="all")
    layer = swaps.layers["moe"]
    before, at_x, after = (experts(model, x + share * swaps.steps) for share in (0.999, 0, 1.001))
    assert torch.equal(before, at_x)
    for image, token in enumerate(swaps.token):
        assert (before[image] != after[image]).any(-1).nonzero().flatten().tolist() == [token]
        left = set(before[image, token].tolist()) - set(after[image, token].tolist())
        came = set(after[image, token].tolist()) - set(before[image, token].tolist())
        assert left == {int(layer.leaving[image, token])}
        assert came == {int(layer.coming[image, token])}


def test_no_other_step_of_the_nearest_distance_changes_an_expert():
    model, x = LinearlyRouted(), points()
    swaps = nearest_swaps(model, x, norm="L2", pairs="all")
    at_x = experts(model, x)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(x.shape, generator=generator, **wide)
        step *= (0.999 * swaps.nearest / step.norm(dim=1))[:, None]
        assert torch.equal(experts(model, x + step), at_x)


def test_the_gradient_goes_through_earlier_layers_whose_experts_stay():
    model, x = vmoe(), images_of(3)
    swaps = nearest_swaps(model, x, norm="L2", layers=[-1])
    layer = swaps.layers["blocks.1.mlp"]
    assert list(swaps.layers) == ["blocks.1.mlp"]

    def gaps(at):
        with trace_routing(model) as trace:
            model(at)
        logits = trace.layers["blocks.1.mlp"].logits.view(3, 4, 4)
        pair = torch.stack([layer.leaving, layer.coming], 2)
        first, second = logits.gather(2, pair).unbind(2)
        return (first - second).gather(1, swaps.token[:, None])[:, 0]

    # Towards the swap the gap falls as fast as it can: by gap / distance for a unit of length.
    unit = swaps.steps / swaps.nearest.view(-1, 1, 1, 1)
    share = 1e-5
    falls = (gaps(x - share * unit) - gaps(x + share * unit)) / (2 * share)
    torch.testing.assert_close(falls, gaps(x) / swaps.nearest, rtol=1e-6, atol=0)
    torch.testing.assert_close(gaps(x), layer.gaps.gather(1, swaps.token[:, None])[:, 0])


@pytest.mark.parametrize("options", [{}, {"ensemble_size": 2, "num_experts": 6}])
def test_all_pairs_come_nearer_where_a_wider_gap_is_steeper(options):
    model, x = vmoe(**options), images_of(3)
    default, every = (nearest_swaps(model, x, **pairs) for pairs in ({}, {"pairs": "all"}))
    assert torch.equal(default.nearest, every.nearest)
    following, every = (nearest_swaps(model, x, pairs=pairs) for pairs in ("next", "all"))
    for name, layer in every.layers.items():
        before = following.layers[name]
        assert (layer.distances <= before.distances * (1 + 1e-12)).all()
        same = (layer.leaving == before.leaving) & (layer.coming == before.coming)
        torch.testing.assert_close(layer.distances[same], before.distances[same])
        assert 0 < same.sum() < same.numel()
        assert (layer.distances < before.distances)[~same].all()


def test_layers_tokens_and_batches_are_parts_of_the_whole():
    model, x = vmoe(), images_of(5)
    whole = nearest_swaps(model, x)
    in_parts = nearest_swaps(model, x, batch_size=2)
    some = nearest_swaps(model, x, layers=[-1], tokens=[-1, 0])
    assert list(whole.layers) == ["blocks.0.mlp", "blocks.1.mlp"]
    for name, layer in whole.layers.items():
        for one, other in zip(layer, in_parts.layers[name], strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(in_parts.nearest, whole.nearest)
    torch.testing.assert_close(in_parts.steps, whole.steps)

    part = some.layers["blocks.1.mlp"]
    assert part.tokens.tolist() == [0, 3]
    torch.testing.assert_close(part.distances, whole.layers["blocks.1.mlp"].distances[:, [0, 3]])
    assert torch.equal(some.nearest, part.distances.amin(1)) and set(some.token.tolist()) <= {0, 3}

    together = torch.stack([layer.distances for layer in whole.layers.values()], 1)
    assert torch.equal(whole.nearest, together.flatten(1).amin(1))
    assert torch.equal(whole.layer * 4 + whole.token, together.flatten(1).argmin(1))


@pytest.mark.parametrize("make", [lambda: vmoe(top_k=4), dense])
def test_without_another_expert_there_is_no_swap(make):
    swaps = nearest_swaps(make(), images_of(6))
    assert swaps.nearest.isinf().all() and not swaps.steps.any()
    assert swaps.layer.tolist() == swaps.token.tolist() == [-1] * 6
    assert all((layer.coming == 4).all() for layer in swaps.layers.values())
    assert boundary_profile(swaps, [0.0, 1e9, float("inf")]).images.tolist() == [0, 0, 0]


def test_a_member_of_an_ensemble_swaps_among_its_own_experts():
    model, x = vmoe(ensemble_size=2, num_experts=6), images_of(3)
    for layer in nearest_swaps(model, x).layers.values():
        assert layer.distances.shape == (3, 8)  # 2 members with 4 tokens each
        assert layer.distances.isfinite().all()
        member = torch.arange(8) // 4
        for chosen in (layer.leaving, layer.coming):
            assert torch.equal(chosen // 3, member.expand(3, 8))

    every = vmoe(ensemble_size=2, num_experts=4)  # each member has as many experts as choices
    assert nearest_swaps(every, x).nearest.isinf().all()


def test_a_token_on_which_no_logit_depends_is_never_the_nearest():
    """In the last block all but the class token, at position 0."""
    model, x = vmoe(classifier="token"), images_of(5)
    swaps = nearest_swaps(model, x)
    first, last = swaps.layers.values()
    assert first.matters.all() and last.matters.tolist() == [[True] + [False] * 4] * 5
    assert last.distances.isfinite().all()
    assert torch.equal(swaps.nearest, first.distances.amin(1).minimum(last.distances[:, 0]))
    assert (last.distances.amin(1) < swaps.nearest).any()

    jumps = swap_jumps(model, x, swaps)
    assert (jumps.logits > 1e-6).all()
    for token in range(5):
        jumps = swap_jumps(model, x, swaps, ("blocks.1.mlp", token))
        assert (jumps.layer_outputs > 1e-6).all()
        assert (jumps.logits > 1e-6).all() if token == 0 else (jumps.logits < 1e-12).all()

    # A choice that is dropped leaves its place to another token.
    limited = vmoe(classifier="token", capacity=Capacity(0.75, images_per_group=1, multiple_of=1))
    assert all(layer.matters.all() for layer in nearest_swaps(limited, x).layers.values())
    with torch.no_grad():
        model.head.weight.zero_()  # as in a new model, whose logits are constant
    assert nearest_swaps(model, x).nearest.isinf().all()


def test_padding_has_no_swap_and_changes_none():
    model, x = vmoe(), images_of(3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    swaps = nearest_swaps(model, x, extra=mask)
    free = nearest_swaps(model, x)
    for name, layer in swaps.layers.items():
        assert torch.equal(layer.real, mask)
        assert torch.equal(layer.distances.isinf(), ~mask)
        rest = [0, 2]
        torch.testing.assert_close(layer.distances[rest], free.layers[name].distances[rest])
    profile = boundary_profile(swaps, [1e9])
    assert profile.tokens.tolist() == [1]  # of the real tokens


def test_the_profile_counts_images_and_tokens_within_each_radius():
    swaps = nearest_swaps(vmoe(), images_of(5))
    every = torch.stack([layer.distances for layer in swaps.layers.values()])
    radii = [0.0, float(every.quantile(0.3)), float(every.max())]
    profile = boundary_profile(swaps, radii)
    assert profile.radii.tolist() == radii
    assert profile.tokens[2] == profile.images[2] == 1 and profile.tokens[0] == 0
    assert profile.tokens[1] == (every <= radii[1]).double().mean()
    assert profile.images[1] == (swaps.nearest <= radii[1]).double().mean()
    torch.testing.assert_close(torch.stack(list(profile.layers.values())).mean(0), profile.tokens)
    with pytest.raises(ValueError, match="radii must be a sequence of numbers of at least 0"):
        boundary_profile(swaps, [-1.0])


def test_a_choice_by_scores_and_a_bias_is_measured_in_what_is_compared():
    model, x = LinearlyRouted(selection_bias=True, score="sigmoid"), points()
    router = model.moe.router
    with torch.no_grad():
        router.selection_bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.3], **wide))
    swaps = nearest_swaps(model, x, pairs="next")
    layer = swaps.layers["moe"]

    tokens = model.stem(x).unflatten(1, (3, 6))
    compared = (tokens @ router.weight.T).sigmoid() + router.selection_bias
    best = compared.topk(3, -1).values
    torch.testing.assert_close(layer.gaps, (best[..., 1] - best[..., 2]).detach())
    at_x = experts(model, x)
    for share, changes in ((0.9, 0), (1.1, 1)):  # to first order
        moved = experts(model, x + share * swaps.steps) != at_x
        assert moved.any(-1).sum(1).tolist() == [changes] * 6


def test_a_capacity_by_image_leaves_the_choices_of_the_router():
    model, x = vmoe(), images_of(4)
    limited = vmoe(capacity=Capacity(0.5, images_per_group=1, multiple_of=1))
    with trace_routing(limited) as trace:
        limited(x)
    assert not trace.layers["blocks.0.mlp"].kept.all()
    layers = [nearest_swaps(each, x).layers["blocks.0.mlp"] for each in (model, limited)]
    for one, other in zip(*layers, strict=True):  # nothing lies before the first layer
        torch.testing.assert_close(one, other)


def always_the_last_two(decision):
    experts = torch.tensor([2, 3]).expand_as(decision.routing.experts)
    return decision.routing._replace(experts=experts)


def test_what_cannot_be_measured_is_refused():
    x = images_of(3)

    def layer(router):
        return vmoe(make_moe=lambda: MoE(12, 16, 4, router=router, activation="gelu_tanh"))

    by_experts = ExpertChoiceRouter(12, 4, 1.0, images_per_group=1, multiple_of=1)
    refused = {
        "judge each image by itself .* images_per_group=1 does not": vmoe(capacity=Capacity(1.0)),
        "Expert Choice, where experts choose tokens": layer(by_experts),
        "among all experts, .* change whole groups": layer(
            TopKRouter(12, 4, 1, groups=ExpertGroups(2, 1, "max"))
        ),
    }
    for message, model in refused.items():
        with pytest.raises(ValueError, match=message):
            nearest_swaps(model, x)

    model = vmoe()
    with (
        pytest.raises(ValueError, match="layers must give each token the experts of its largest"),
        intervene(model, always_the_last_two),
    ):
        nearest_swaps(model, x)
    with pytest.raises(ValueError, match=r"layers must be among blocks\.0\.mlp, .* got 'head'"):
        nearest_swaps(model, x, layers=["head"])
    with pytest.raises(ValueError, match=r"tokens must be from -4 to 3 in 'blocks\.0\.mlp', got 4"):
        nearest_swaps(model, x, tokens=[4])
    with pytest.raises(ValueError, match="tokens must be at least one position"):
        nearest_swaps(model, x, tokens=[])
    for tokens in (0, "0", [0.5]):
        with pytest.raises(TypeError, match="tokens must be a sequence of whole numbers"):
            nearest_swaps(model, x, tokens=tokens)
    for hidden in (model.forward, lambda x: model(x)):
        with pytest.raises(TypeError, match=r"must be an nn.Module, whose routed layers"):
            nearest_swaps(hidden, x)
    with pytest.raises(ValueError, match=r"pairs must be one of \('next', 'all'\), got 'some'"):
        nearest_swaps(model, x, pairs="some")
    with pytest.raises(ValueError, match="norm must be one of"):
        nearest_swaps(model, x, norm="L7")
    with pytest.raises(
        TypeError, match=r"x must be a float32 or float64 tensor.* model\.float\(\)"
    ):
        nearest_swaps(model, x.bfloat16())
    with pytest.raises(ValueError, match="x must be finite"):
        nearest_swaps(model, x / 0)


def test_the_model_comes_back_as_it_was():
    model, x = vmoe().train(), images_of(3)
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    state = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        swaps = nearest_swaps(model, x)
    assert state == [
        (m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()
    ]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    torch.testing.assert_close(swaps.nearest, nearest_swaps(model.eval(), x).nearest)
