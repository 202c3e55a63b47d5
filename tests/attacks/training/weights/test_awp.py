"""Perturbed weights: exactly where they should be, and back again bit for bit."""

import copy
import gc
import pickle

import pytest
import torch
from hf_families import EXPERTS, build
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_toys import EPS, batch, linear, vmoe

from ironmoe.attacks.training import (
    AWP,
    MART,
    PGDAT,
    TRADES,
    TRAINING_METHODS,
    Alternating,
    Free,
    NonFiniteLoss,
    Standard,
    TrainingMethod,
)
from ironmoe.kernels import Routing
from ironmoe.moe import MoE, collect_aux_loss
from ironmoe.moe.routers.top_k import RouterOutput

GAMMA = 0.01


def values(model):
    return [weight.detach().clone() for weight in model.parameters()]


def same(before, model):
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def images_of(count=4, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.rand(count, 1, 8, 8, dtype=dtype), torch.arange(count) % 4


def test_the_loss_and_the_gradient_are_those_at_w_plus_v_and_w_comes_back():
    model, (images, labels) = linear(), batch()
    w = model[1].weight.detach().clone()
    method = AWP(PGDAT(model, EPS, start="clean"), gamma=GAMMA)
    points = method.adversarial(images, labels)

    (d,) = torch.autograd.grad(
        nn.functional.cross_entropy(model(points), labels), [model[1].weight]
    )
    v = GAMMA * w.norm() / d.norm() * d
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[1].weight.add_(v)
    expected = nn.functional.cross_entropy(moved(points), labels)
    expected.backward()

    loss = method(images, labels)
    assert torch.allclose(loss, expected, rtol=1e-14)
    assert torch.allclose(model[1].weight, w + v, rtol=1e-14)
    assert (model[1].weight - w).norm().item() == pytest.approx(GAMMA * w.norm().item())
    loss.backward()
    assert torch.equal(model[1].weight, w)
    assert torch.allclose(model[1].weight.grad, moved[1].weight.grad, rtol=1e-12)
    assert torch.allclose(model[1].bias.grad, moved[1].bias.grad, rtol=1e-12)


@pytest.mark.parametrize("kind", [PGDAT, TRADES, MART, Free, Standard])
def test_the_loss_grows_and_no_bias_is_moved(kind):
    model, (images, labels) = vmoe(router={"noise_std": 0.0}).double(), images_of(8, torch.float64)
    options = {} if kind in (Free, Standard) else {"steps": 2}
    method = kind(model, EPS, **options)
    before = dict(copy.deepcopy(model).named_parameters())
    torch.manual_seed(0)
    plain = method(images, labels)
    torch.manual_seed(0)
    loss = AWP(method, gamma=1e-3)(images, labels)
    assert loss > plain
    for name, weight in model.named_parameters():
        moved = not torch.equal(weight, before[name])
        stacked = ".fc" in name and weight.shape[0] == 4
        assert not moved or weight.ndim > 1 + stacked, name
    loss.backward()
    assert same(before.values(), model)


@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_every_method_is_wrapped_and_its_updates_begin_and_end_at_w(name):
    model = vmoe(router={"balance_weight": 0.1}).train()
    method = AWP(TRAINING_METHODS[name].kind(model, EPS))
    w = values(model)
    groups = []
    for update in method.updates(*images_of()):
        assert not same(w, model)
        update.loss.backward()
        assert same(w, model) and not collect_aux_loss(model)
        weights = method.parameters_of(update.group)
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)
        groups.append(update.group)
    assert len(groups) == method.updates_per_batch and set(groups) == set(method.groups)


@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_until_the_warm_up_ends_a_batch_is_trained_at_w(name):
    model = vmoe().train()
    method = AWP(TRAINING_METHODS[name].kind(model, EPS), warmup_steps=2)
    w, moved = values(model), []
    for _ in range(3):
        for update in method.updates(*images_of()):
            moved.append(not same(w, model))
            update.loss.backward()
            assert same(w, model)
    updates = method.updates_per_batch
    assert moved == [False] * (2 * updates) + [True] * updates

    going_on = AWP(TRAINING_METHODS[name].kind(model, EPS), warmup_steps=2)
    going_on.load_state_dict(method.state_dict())
    update = next(going_on.updates(*images_of()))
    assert not same(w, model)
    update.loss.backward()


def test_each_expert_moves_by_its_own_length_and_an_idle_one_stays():
    torch.manual_seed(0)
    moe = MoE(6, 5, 4, 1, router=Fixed())
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), moe, nn.Linear(6, 3)).double()
    with torch.no_grad():
        moe.fc1.weight[0].mul_(10)  # the experts have different lengths
    before = copy.deepcopy(moe)
    images, labels = batch()
    loss = AWP(PGDAT(model, EPS, steps=1), gamma=GAMMA)(images, labels)
    for old, new in ((before.fc1, moe.fc1), (before.fc2, moe.fc2)):
        lengths = (new.weight - old.weight).flatten(1).norm(dim=1)
        expected = GAMMA * old.weight.flatten(1).norm(dim=1)
        expected[3] = 0  # no token takes it
        assert torch.allclose(lengths, expected, rtol=1e-9)
        assert torch.equal(new.weight[3], old.weight[3]) and torch.equal(new.bias, old.bias)
    loss.backward()
    assert same(before.parameters(), moe)


class Fixed(nn.Module):
    """A router that gives token t to expert t mod 3 of four."""

    num_experts = 4

    def forward(self, x):
        experts = (torch.arange(len(x)) % 3).to(torch.int32)[:, None]
        gates = x.new_full((len(x), 1), 0.7, dtype=torch.float32)
        return RouterOutput(Routing(gates, experts), x.new_zeros(len(x), 4), None)


def test_the_proxy_pass_leaves_nothing_behind():
    router = {"selection_bias": True, "balance_weight": 0.1, "noise_std": 1.0}
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.3), vmoe(router=router)).train()
    images, labels = images_of()
    plain = copy.deepcopy(model)
    losses, states = [], []
    for weights, method in ((plain, Standard(plain)), (model, AWP(Standard(model), gamma=1e-9))):
        torch.manual_seed(0)
        losses.append(method(images, labels).detach())
        states.append(torch.get_rng_state())
        assert all(weight.grad is None for weight in weights.parameters())
    assert torch.allclose(*losses, rtol=1e-5) and torch.equal(*states)
    for (name, expected), found in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(expected, found), name
    routers = [each[2].blocks[0].mlp.router for each in (plain, model)]
    assert torch.equal(routers[0].choices, routers[1].choices) and routers[0].choices.any()
    assert not collect_aux_loss(model)


def test_gradients_that_are_there_are_added_to_and_autograd_grad_restores_too():
    model, (images, labels) = linear(), batch()
    before = values(model)
    method = AWP(Standard(model))
    method(images, labels).backward()
    once = model[1].weight.grad.clone()
    method(images, labels).backward()
    assert torch.allclose(model[1].weight.grad, 2 * once) and same(before, model)
    torch.autograd.grad(method(images, labels) / 2, [model[1].bias])
    assert same(before, model)


def test_weights_come_back_without_a_backward_pass_and_after_errors():
    model, (images, labels) = linear(dtype=torch.float32), batch(dtype=torch.float32)
    before = values(model)
    method = AWP(PGDAT(model, EPS, steps=1))

    kept = method(images, labels)
    assert not same(before, model)
    again = method(images, labels)  # begins at w although the first loss lives
    again.backward()
    assert same(before, model) and kept.requires_grad

    loss = method(images, labels)
    del loss
    assert same(before, model)
    with torch.no_grad():
        method(images, labels)
    assert same(before, model)

    hook = model[1].register_forward_hook(lambda *_: fail() if not same(before, model) else None)
    with pytest.raises(KeyError):
        method(images, labels)
    hook.remove()
    assert same(before, model) and method.method._perturbation is None
    method(images, labels)
    gc.collect()
    assert same(before, model)


def fail():
    raise KeyError("moved weights")


def test_a_loss_that_is_nan_leaves_the_weights():
    model, (images, labels) = linear(dtype=torch.float32), batch(dtype=torch.float32)
    before = values(model)
    method = AWP(Broken(model, EPS))
    with pytest.raises(NonFiniteLoss):
        method(images, labels)
    assert same(before, model)


class Broken(PGDAT):
    def _losses(self, images, labels, points):
        return super()._losses(images, labels, points) * torch.nan


def test_checkpointed_layers_run_again_at_the_moved_weights():
    class Checkpointed(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=False)

    def layers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))

    images, labels = batch(dtype=torch.float32)
    plain, model = layers(), Checkpointed(layers())
    before = values(model)
    AWP(Standard(plain))(images, labels).backward()
    AWP(Standard(model))(images, labels).backward()
    assert same(before, model)
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(expected.grad, found.grad, rtol=1e-5, atol=1e-7)


def test_it_is_used_as_the_method_is():
    model, (images, labels) = linear(), batch()
    method = AWP(Free(model, EPS, replays=2, ramp_steps=3))
    assert isinstance(method, TrainingMethod)
    assert (method.updates_per_batch, method.groups, method.eps) == (2, ("all",), EPS)
    before = values(model)
    losses = []
    for update in method.updates(images, labels):
        assert not same(before, model)
        update.loss.backward()
        losses.append(update.loss)
        assert same(before, model)
    assert len(losses) == 2 and method.step == 1 and "adversarial_correct" in method.last
    assert "delta.0" in method.state_dict()

    method.step = 2
    assert method.method.step == 2 and method.strength.eps == EPS
    later = AWP(Free(model, EPS, replays=2))
    later.load_state_dict(method.state_dict())
    assert torch.equal(later.adversarial(images, labels), method.adversarial(images, labels))
    assert copy.deepcopy(method).gamma == 0.01
    for _ in range(2):
        next(method.updates(images, labels))  # given up
    assert same(before, model)


def test_frozen_weights_and_unused_ones_stay():
    model, (images, labels) = linear(), batch()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[1](model[0](x))
    model[1].weight.requires_grad_(False)
    before = values(model)
    AWP(PGDAT(model, EPS, steps=1))(images, labels)
    assert same(before, model)


def test_an_autocast_around_the_call_meets_the_moved_weights():
    model, (images, labels) = linear(dtype=torch.float32), batch(dtype=torch.float32)
    own = AWP(Standard(model, autocast_dtype=torch.bfloat16), gamma=0.5)(images, labels).detach()
    method = AWP(Standard(model), gamma=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = Standard(model)(images, labels)  # its cast of w is kept by the autocast
        loss = method(images, labels)
        loss.backward()
        again = Standard(model)(images, labels)
    assert torch.equal(loss, own) and loss > plain and torch.equal(plain, again)


def test_bfloat16_weights_move():
    model, (images, labels) = linear(dtype=torch.bfloat16), batch(dtype=torch.bfloat16)
    before = values(model)
    loss = AWP(PGDAT(model, EPS, steps=1), gamma=0.1)(images, labels)
    length = (model[1].weight.float() - before[0].float()).norm()
    assert length.item() == pytest.approx(0.1 * before[0].float().norm().item(), rel=0.05)
    loss.backward()
    assert same(before, model)


@pytest.mark.parametrize(
    "options", [{"gamma": 0.0}, {"gamma": -1.0}, {"proxy_rate": 0.0}, {"warmup_steps": -1}]
)
def test_bad_factors(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        AWP(Standard(linear()), **options)


def test_only_methods_are_wrapped_and_once():
    with pytest.raises(TypeError, match="method must be a TrainingMethod without AWP, got Sequ"):
        AWP(linear())
    with pytest.raises(TypeError, match="got AWP"):
        AWP(AWP(Standard(linear())))


def test_stacked_experts_of_hugging_face_move_one_by_one():
    class OnImages(nn.Module):
        """The 16 pixels of an image are two tokens."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 32)
            self.language = build("gpt_oss")

        def forward(self, images):
            return self.language(inputs_embeds=self.stem(images.view(-1, 2, 8))).logits[:, -1]

    model = OnImages().train()
    before = dict(copy.deepcopy(model).named_parameters())
    images, labels = batch(dtype=torch.float32)
    loss = AWP(Standard(model), gamma=GAMMA)(images, labels)
    seen = 0
    for name, weight in model.named_parameters():
        change = weight - before[name]
        if "experts" not in name:
            continue
        if weight.ndim == 2:
            assert not change.any(), name
            continue
        lengths = change.flatten(1).norm(dim=1)
        expected = GAMMA * before[name].flatten(1).norm(dim=1)
        idle = lengths == 0
        assert len(lengths) == EXPERTS and not idle.all()
        assert torch.allclose(lengths[~idle], expected[~idle], rtol=1e-3)
        seen += 1
    assert seen == 4
    loss.backward()
    assert same(before.values(), model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda awp: pickle.loads(pickle.dumps(awp))])
def test_a_copy_made_before_the_backward_pass_begins_at_w(copied):
    awp = AWP(Standard(linear()), gamma=GAMMA)
    weight = awp.model[1].weight.detach().clone()
    loss = awp(*batch())
    assert loss.requires_grad and not torch.equal(awp.model[1].weight, weight)

    other = copied(awp)
    assert torch.equal(other.model[1].weight, weight) and torch.equal(awp.model[1].weight, weight)
    other(*batch()).backward()
    assert torch.equal(other.model[1].weight, weight)


def only_vectors(model):
    """Biases and the weights of norms alone are trained."""
    for weight in model.parameters():
        weight.requires_grad_(weight.ndim == 1)
    return model


def test_a_model_without_a_weight_to_move_is_refused():
    with pytest.raises(ValueError, match="weights of at least two axes that require gradients"):
        AWP(Standard(only_vectors(vmoe())))


def test_a_group_without_a_weight_to_move_is_trained_at_w():
    model = only_vectors(vmoe())
    for block in model.blocks:
        block.mlp.router.requires_grad_(True)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    plain, moved = Alternating(model, EPS, steps=1), AWP(Alternating(model, EPS, steps=1))
    losses = []
    for method in (plain, moved):
        torch.manual_seed(0)
        losses += [update.loss.item() for update in method.updates(images, labels)]
    assert losses[0] == losses[2] and losses[1] != losses[3]


def test_a_weight_whose_gradient_is_not_finite_stays_and_the_others_move():
    """The root of 0 has an infinite slope, and the loss is finite."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 3), nn.Linear(16, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.second(x) + (0 * self.first(x)).abs().sqrt()

    torch.manual_seed(0)
    model, (images, labels) = Root().double(), batch()
    before, moved = values(model), {}
    method = AWP(Standard(model), gamma=GAMMA)
    hook = model.second.register_forward_hook(
        lambda *_: moved.update({name: w.detach().clone() for name, w in model.named_parameters()})
    )
    method(images, labels).backward()
    hook.remove()
    assert torch.equal(moved["first.weight"], before[0])
    assert not torch.equal(moved["second.weight"], before[2]) and same(before, model)
    assert model.first.weight.grad.isnan().any()  # for the loop to find
