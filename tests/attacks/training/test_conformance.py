"""What every registered training method keeps to."""

import copy
import math

import pytest
import torch
from torch import nn
from training_toys import EPS, vmoe

from ironmoe.attacks.training import TRAINING_METHODS, TrainingMethod
from ironmoe.moe import collect_aux_loss


def dense():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)
    )


def noisy_vmoe():
    return vmoe(router={"selection_bias": True, "balance_weight": 0.1})


MODELS = {"dense": dense, "vmoe": noisy_vmoe}
CASES = [
    pytest.param(name, model, id=f"{name}-{model}")
    for name, entry in TRAINING_METHODS.items()
    for model in MODELS
    if model == "vmoe" or not entry.needs_experts
]


def made(name, model, **options):
    """A method with two inner steps, where it takes them."""
    entry = TRAINING_METHODS[name]
    return entry.kind(model, EPS, **({} if entry.single_step else {"steps": 2}) | options)


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    return 0.2 + 0.6 * torch.rand(4, 1, 8, 8, dtype=dtype), torch.arange(4)


def trained(method, batches, seed=0):
    """The losses of some batches, one plain SGD for each group."""
    images, labels = batch()
    steps = {g: torch.optim.SGD(method.parameters_of(g), lr=0.05) for g in method.groups}
    losses = []
    for number in range(batches):
        torch.manual_seed(seed + number)
        for update in method.updates(images, labels):
            steps[update.group].zero_grad()
            update.loss.backward()
            steps[update.group].step()
            losses.append(update.loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_updates_train_the_weights_of_their_groups(name, model):
    method = made(name, MODELS[model]().train())
    images, labels = batch()
    seen = []
    for update in method.updates(images, labels):
        weights = method.parameters_of(update.group)
        for weight in method.model.parameters():
            weight.grad = None
        assert update.loss.shape == () and update.loss.dtype == torch.float32
        update.loss.backward()
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)
        assert torch.equal(method.last["loss"], update.loss.detach())
        assert all(not value.requires_grad for value in method.last.values())
        seen.append(update.group)
    assert len(seen) == method.updates_per_batch and set(seen) == set(method.groups)
    assert method.step == 1
    groups = [id(weight) for group in method.groups for weight in method.parameters_of(group)]
    assert sorted(groups) == sorted(id(weight) for weight in method.model.parameters())


@pytest.mark.parametrize(("name", "model"), CASES)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_image_is_perturbed(name, model, norm):
    method = made(name, MODELS[model]().train(), norm=norm)
    images, labels = batch()
    for update in method.updates(images, labels):
        update.loss.backward()  # Free moves here
    points = method.adversarial(images, labels)
    change = (points - images).flatten(1)
    order = math.inf if norm == "Linf" else 2
    lengths = change.norm(order, dim=1)
    if name == "standard":
        assert not change.any()
        return
    assert lengths.min() > EPS / 10
    reach = 3 if name == "n-fgsm" else 1
    assert lengths.max() <= reach * EPS * (1 + 1e-5)
    assert points.min() >= 0 and points.max() <= 1


@pytest.mark.parametrize(("name", "model"), CASES)
def test_a_call_leaves_the_model_as_it_was(name, model):
    user = MODELS[model]().train()
    method = made(name, user)
    next(iter(user.parameters())).requires_grad_(False)
    flags = [module.training for module in user.modules()]
    asked = [weight.requires_grad for weight in user.parameters()]
    before = [weight.clone() for weight in user.parameters()]

    loss = method(*batch())
    assert loss.requires_grad
    assert flags == [module.training for module in user.modules()]
    assert all(weight.grad is None for weight in user.parameters())
    loss.backward()  # until then only some of the weights may ask for gradients
    assert asked == [weight.requires_grad for weight in user.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, user.parameters(), strict=True))
    assert not torch.is_tensor(collect_aux_loss(user)) or not collect_aux_loss(user).any()


@pytest.mark.parametrize(("name", "model"), CASES)
def test_what_is_saved_continues_bit_for_bit(name, model):
    method = made(name, MODELS[model]().train(), ramp_steps=4)
    first = trained(method, 2)
    again = trained(made(name, MODELS[model]().train(), ramp_steps=4), 2)
    assert torch.equal(first, again)  # the same seeds

    later = made(name, copy.deepcopy(method.model), ramp_steps=4)
    later.load_state_dict(method.state_dict())
    for value in method.state_dict().values():
        assert isinstance(value, int | float | torch.Tensor)
    assert torch.equal(trained(method, 2, seed=7), trained(later, 2, seed=7))


@pytest.mark.parametrize(("name", "model"), CASES)
def test_bfloat16_autocast_is_finite_and_trains_float32_weights(name, model):
    method = made(name, MODELS[model]().train(), autocast_dtype=torch.bfloat16)
    assert trained(method, 2).isfinite().all()
    assert all(weight.dtype == torch.float32 for weight in method.model.parameters())


@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_entries_say_what_help_and_docs_need(name):
    entry = TRAINING_METHODS[name]
    assert issubclass(entry.kind, TrainingMethod) and entry.name == name
    assert entry.summary.endswith(".") and entry.cost
    method = made(name, noisy_vmoe())
    assert all(hasattr(method, option) for option in entry.takes)
