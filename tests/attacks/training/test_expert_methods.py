"""The methods for mixtures of experts, by closed forms in float64."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from training_toys import EPS, batch, linear, rows, vmoe

from ironmoe.attacks import RoutingDivergence, StraightThrough
from ironmoe.attacks.training import Alternating, RoutingConsistency, SecondRanked, pgd
from ironmoe.attacks.training.methods.second_ranked import _SecondRanks
from ironmoe.moe import (
    ExpertChoiceRouter,
    MoE,
    SoftMoE,
    TopKRouter,
    collect_aux_loss,
    intervene,
    trace_routing,
)
from ironmoe.moe.policies import UseRanks

QUIET = {"noise_std": 0.0, "load_weight": 0.0}  # a router without noise, whose loss is importance


def quiet():
    return MoE(6, 10, 4, 2, router=TopKRouter(6, 4, 2, **QUIET))


def kl(p_logits, q_logits):
    """(…,) KL(p ‖ q) from its definition."""
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def passes(model, *batches):
    """Logits of each batch, and the router logits (T, E) of each layer for it."""
    logits, routers = [], []
    for images in batches:
        with trace_routing(model, keep_graph=True) as trace:
            logits.append(model(images))
        routers.append([layer.logits for layer in trace.layers.values()])
    return logits, routers


def robust_loss(model, images, labels, points, beta, routing_beta=0.0):
    """What ``Alternating`` promises, written down; auxiliary losses are the mean of two passes."""
    (clean, attacked), (before, after) = passes(model, images, points)
    loss = nn.functional.cross_entropy(clean, labels) + beta * kl(clean, attacked).mean()
    drift = torch.stack([kl(p, q).mean() for p, q in zip(before, after, strict=True)]).mean()
    return loss + routing_beta * drift + collect_aux_loss(model) / 2


def gradients(loss, model):
    weights = dict(model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("attack", ["kl", "ce"])
def test_each_update_of_alternating_has_the_gradients_of_its_own_group_alone(attack):
    model, (images, labels) = rows(make_moe=quiet), batch()
    method = Alternating(model, EPS, attack=attack, steps=2, beta=3, routing_beta=2)
    groups = {group: set(method.parameters_of(group)) for group in method.groups}
    assert groups["routers"] == {moe.router.weight for moe in model.moes}
    assert groups["experts"] == set(model.parameters()) - groups["routers"]

    torch.manual_seed(5)
    updates = method.updates(images, labels)
    for group, routing_beta in (("experts", 0.0), ("routers", 2.0)):
        torch.manual_seed(7)
        loss, found_group = next(updates)
        torch.manual_seed(7)
        points = method.adversarial(images, labels)
        model.zero_grad()
        loss.backward()
        assert found_group == group and all(p.requires_grad for p in model.parameters())

        expected = robust_loss(model, images, labels, points, 3, routing_beta)
        assert torch.allclose(loss, expected, rtol=1e-10)
        full = gradients(expected, model)
        for name, weight in model.named_parameters():
            if weight in groups[group]:
                assert torch.allclose(weight.grad, full[name], rtol=1e-8, atol=1e-12), name
                assert weight.grad.abs().max() > 0
            else:
                assert weight.grad is None, name
        with torch.no_grad():  # so the next points must be made against another model
            for weight in groups[group]:
                weight -= 0.3 * weight.grad
    assert next(updates, None) is None and method.step == 1


def test_alternating_in_a_loop_with_one_optimizer_moves_one_group_each_time():
    model, (images, labels) = rows(), batch()
    method = Alternating(model, EPS, steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    routers = set(method.parameters_of("routers"))
    for turn in range(4):
        before = {weight: weight.detach().clone() for weight in model.parameters()}
        optimizer.zero_grad()
        method(images, labels).backward()
        optimizer.step()
        moved = {weight for weight, old in before.items() if not torch.equal(weight, old)}
        assert (moved <= routers) if turn % 2 else not (moved & routers)
        assert moved


def test_parts_of_a_batch_may_be_updated_side_by_side():
    model, (images, labels) = rows(), batch()
    method, seen = Alternating(model, EPS, steps=1, ramp_steps=4), []
    method._attack = lambda images, labels, strength: seen.append(strength.eps) or images
    parts = [method.updates(images[part::2], labels[part::2]) for part in (0, 1)]
    for group in method.groups:
        assert [next(part).group for part in parts] == [group, group]
    assert seen == [EPS / 4] * 4 and method.step == 1


def test_weights_are_frozen_in_the_passes_of_the_other_group_alone():
    model, (images, labels) = rows(), batch()
    method = Alternating(model, EPS, steps=1)
    loss = method(images, labels)
    assert all(weight.requires_grad for weight in model.parameters())
    loss.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert all(weight.requires_grad for weight in model.parameters())

    method.inner.asked.forwards = None  # the next attack fails
    with pytest.raises(TypeError):
        method(images, labels)
    assert all(weight.requires_grad for weight in model.parameters())


def test_weights_that_a_user_froze_stay_frozen():
    model, (images, labels) = rows(), batch()
    model.moes[0].router.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    method = Alternating(model, EPS, steps=1)
    for update in method.updates(images, labels):
        update.loss.backward()
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == ["moes.0.router.weight", "head.bias"]


def test_the_attack_of_alternating_raises_the_divergence_of_routing():
    model, (images, labels) = rows(make_moe=quiet), batch(30)

    def drift(**options):
        torch.manual_seed(2)
        method = Alternating(model, EPS, steps=5, **options)
        _, (before, after) = passes(model, images, method.adversarial(images, labels))
        return sum(kl(p, q).mean().item() for p, q in zip(before, after, strict=True))

    plain = drift(routing_weight=0)
    assert drift(routing_weight=100.0) > 1.5 * plain
    # beside another mode, too
    assert drift(routing_weight=100.0, routing=StraightThrough()) > 1.5 * plain
    with pytest.raises(ValueError, match="modes must keep different things"):
        drift(routing=RoutingDivergence())


@pytest.mark.parametrize("through_clean", [True, False])
def test_routing_consistency_adds_the_divergence_of_the_outer_passes(through_clean):
    model, (images, labels) = rows(make_moe=quiet), batch()
    method = RoutingConsistency(model, EPS, steps=2, weight=3, through_clean=through_clean)
    torch.manual_seed(0)
    loss = method(images, labels)
    torch.manual_seed(0)
    points = pgd(model, images, labels, eps=EPS, steps=2)

    (_, attacked), (before, after) = passes(model, images, points)
    before = before if through_clean else [logits.detach() for logits in before]
    expected = nn.functional.cross_entropy(attacked, labels) + collect_aux_loss(model) / 2
    drifts = [kl(p, q).mean() for p, q in zip(before, after, strict=True)]
    expected = expected + 3 * torch.stack(drifts).mean()
    assert torch.allclose(loss, expected, rtol=1e-10)
    found, wanted = gradients(loss, model), gradients(expected, model)
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-8, atol=1e-12) for n in wanted)


def test_padding_has_no_part_in_the_divergence_of_routing():
    model, (images, labels) = rows(padding=1), batch()
    losses = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        method = RoutingConsistency(model.eval(), EPS, steps=1, weight=weight)
        losses.append(method(images, labels))
    torch.manual_seed(0)
    points = pgd(model, images, labels, eps=EPS, steps=1)
    # a trace leaves padding out
    _, (before, after) = passes(model, images, points)
    assert len(before[0]) == 6 * 3
    expected = sum(kl(p, q).mean() for p, q in zip(before, after, strict=True)) / 2
    assert expected > 0 and torch.allclose(losses[1] - losses[0], expected)


def test_second_ranked_trains_the_experts_of_ranks_k_plus_1_to_2_k():
    model, (images, _) = rows(num_experts=5), batch()
    model.eval()
    with intervene(model, _SecondRanks(model, None)), trace_routing(model) as second:
        logits = model(images)
    with intervene(model, UseRanks(3)), trace_routing(model) as expected:
        assert torch.equal(model(images), logits)
    with trace_routing(model) as own:
        model(images)
    for name, layer in second.layers.items():
        assert torch.equal(layer.experts, expected.layers[name].experts)
    first = next(iter(own.layers.values()))
    by_logit = first.logits.argsort(1, descending=True)
    assert torch.equal(next(iter(second.layers.values())).experts, by_logit[:, 2:4].int())


def test_the_loss_of_second_ranked_is_the_one_of_its_formula():
    model, (images, labels) = rows(make_moe=quiet), batch()
    method = SecondRanked(model, EPS, steps=2, beta=3)
    torch.manual_seed(0)
    loss = method(images, labels)
    torch.manual_seed(0)
    points = pgd(model, images, labels, eps=EPS, steps=2)
    with intervene(model, UseRanks(3)):
        second_points = pgd(model, images, labels, eps=EPS, steps=2)
    assert not torch.allclose(points, second_points)

    expected = nn.functional.cross_entropy(model(points), labels) + collect_aux_loss(model) / 2
    with intervene(model, UseRanks(3)):
        both = model(torch.cat([second_points, images]))
        expected = expected + 3 * kl(both[:6], both[6:]).mean() + collect_aux_loss(model) / 2
    assert torch.allclose(loss, expected, rtol=1e-10)
    found, wanted = gradients(loss, model), gradients(expected, model)
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-8, atol=1e-12) for n in wanted)


@pytest.mark.parametrize("kind", [Alternating, SecondRanked, RoutingConsistency])
def test_nothing_waits_for_a_gpu(kind):
    """Fake tensors have no values: a method that looked at one would raise an error."""
    with FakeTensorMode():
        model = vmoe()
        images, labels = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
        for update in kind(model, EPS, steps=1).updates(images, labels):
            update.loss.backward()


def test_a_pass_between_second_ranked_and_its_backward_pass_is_free():
    model, (images, labels) = rows().eval(), batch()
    expected = model(torch.cat([images, images]))
    loss = SecondRanked(model, EPS, steps=1)(images, labels)
    assert torch.equal(model(torch.cat([images, images])), expected)
    loss.backward()
    assert torch.equal(model(torch.cat([images, images])), expected)


class Untold(nn.Module):
    """A router of one's own around another one."""

    def __init__(self, router):
        super().__init__()
        self.choose, self.scale = router, nn.Parameter(torch.ones(()))

    def forward(self, x, *args, **kwargs):
        return self.choose(x * self.scale, *args, **kwargs)


class Checkpointed(nn.Module):
    def __init__(self, moe, use_reentrant):
        super().__init__()
        self.moe, self.use_reentrant = moe, use_reentrant

    def forward(self, x):
        return checkpoint(self.moe, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("kind", [Alternating, SecondRanked, RoutingConsistency])
def test_checkpointing_changes_no_gradient(kind):
    found = []
    for checkpointed in (False, True):
        model, (images, labels) = rows().train(), batch()
        if checkpointed:
            model.moes = nn.ModuleList([Checkpointed(moe, False) for moe in model.moes])
        method = kind(model, EPS, steps=2)
        torch.manual_seed(0)
        for update in method.updates(images, labels):
            update.loss.backward()
            found += [weight.grad for weight in model.parameters()]
            model.zero_grad()
    half = len(found) // 2
    for plain, repeated in zip(found[:half], found[half:], strict=True):
        assert (plain is None and repeated is None) or torch.equal(plain, repeated)


@pytest.mark.filterwarnings("ignore:the auxiliary loss of")
def test_reentrant_checkpointing_is_refused_where_the_router_would_get_no_gradient():
    model, (images, labels) = rows(), batch()
    model.moes = nn.ModuleList([Checkpointed(moe, True) for moe in model.moes])
    method = RoutingConsistency(model, EPS, steps=1)
    method._attack = lambda images, labels, strength: images
    with pytest.raises(ValueError, match="use_reentrant=False"):
        method(images, labels)


def frozen_routers():
    model = rows()
    for moe in model.moes:
        moe.router.requires_grad_(False)
    return model


def only_routers():
    model = rows().requires_grad_(False)
    model.moes[0].router.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("kind", "model", "options", "message"),
    [
        (Alternating, frozen_routers, {}, r"got none in moes\.0\.router, moes\.1\.router"),
        (Alternating, only_routers, {}, "weights beside its routers'"),
        (Alternating, linear, {}, "must have MoE layers"),
        (SecondRanked, linear, {}, "must have MoE layers"),
        (RoutingConsistency, linear, {}, "must have MoE layers"),
        (Alternating, lambda: SoftMoE(6, 10, 4, 1), {}, "must choose experts"),
        (SecondRanked, rows, {"first": 2.0}, "first must be an int or None, got 2.0"),
        (SecondRanked, rows, {"alarm": "bell"}, 'alarm must be "collapse", an alarm or None'),
        (Alternating, rows, {"attack": "cw"}, 'attack must be "kl" or "ce"'),
        (Alternating, rows, {"routing_beta": -1.0}, "routing_beta must be finite"),
        (RoutingConsistency, rows, {"weight": float("inf")}, "weight must be finite"),
        (SecondRanked, rows, {"beta": -1.0}, "beta must be finite"),
        (
            SecondRanked,
            lambda: rows(top_k=3),
            {},
            "first must be from 1 to 2 in 'moes.0' with num_experts=4 and top_k=3, got 4, which "
            r"is top_k \+ 1",
        ),
        (SecondRanked, rows, {"first": 4}, "first must be from 1 to 3 .* got 4$"),
        (SecondRanked, rows, {"first": 0}, "first must be from 1 to 3 .* got 0$"),
    ],
)
def test_models_and_settings_that_do_not_fit(kind, model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kind(model(), EPS, **options)


def test_routers_that_are_frozen_later_are_refused_in_a_call():
    model, (images, labels) = rows(), batch()
    method = Alternating(model, EPS, steps=1)
    for moe in model.moes:
        moe.router.requires_grad_(False)
    with pytest.raises(ValueError, match="routers must have a weight that requires gradients"):
        method(images, labels)


@pytest.mark.filterwarnings("ignore:model has a capacity")
def test_expert_choice_lists_all_experts_of_a_token_and_so_has_no_second_ones():

    def expert_choice():
        router = ExpertChoiceRouter(6, 4, 1.0, images_per_group=3, multiple_of=1)
        return MoE(6, 10, 4, router=router)

    with pytest.raises(ValueError, match=r"num_experts=4 and top_k=4, got 5, which is top_k \+ 1"):
        SecondRanked(rows(make_moe=expert_choice), EPS)


def test_a_router_that_does_not_tell_k_is_refused_in_a_call():
    model = rows(top_k=3)
    for moe in model.moes:
        moe.router = Untold(moe.router)
    method = SecondRanked(model, EPS, steps=1)
    with pytest.raises(ValueError, match=r"num_experts=4 and top_k=3, got 4, which is top_k \+ 1"):
        method(*batch())


def test_ranks_may_overlap_where_experts_are_few():
    model, (images, labels) = rows(top_k=3), batch()
    SecondRanked(model, EPS, steps=1, first=2)(images, labels).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_an_interrupt_while_a_group_is_frozen_leaves_no_weight_frozen(monkeypatch):
    model = rows()
    method, calls = Alternating(model, EPS, steps=1), []

    def interrupted(weight, required=True):
        calls.append(weight)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.Tensor.requires_grad_(weight, required)

    method.step = 1  # the routers' turn: experts, of which there are many weights, are frozen
    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "requires_grad_", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            method(*batch())
    assert all(weight.requires_grad for weight in model.parameters())
