"""The alarm for routers that collapse: when it speaks, when it is silent, and what it costs."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_toys import EPS, batch, linear, rows, vmoe

from ironmoe.attacks.training import (
    PGDAT,
    TRADES,
    Alternating,
    CollapseAlarm,
    NonFiniteLoss,
    NonFiniteRouter,
    RouterCollapseWarning,
    RoutingConsistency,
    SecondRanked,
    Standard,
)
from ironmoe.kernels import topk_route
from ironmoe.moe import MoE, TopKRouter
from ironmoe.moe.routers.top_k import RouterOutput

E = 4


def biased(top_k=1, favourite=0):
    """A model whose routers send every token to one expert, by their bias."""
    model = rows(top_k=top_k, router=TopKRouter(6, E, top_k, bias=True, noise_std=0, load_weight=0))
    for moe in model.moes:
        moe.router.bias.data[favourite] = 100.0
    return model


def kinds(caught):
    messages = [str(each.message) for each in caught]
    assert all(issubclass(each.category, RouterCollapseWarning) for each in caught)
    layers = {name for name in ("moes.0", "moes.1") for text in messages if repr(name) in text}
    found = {
        kind
        for kind, words in (("dormant", "get no token"), ("load", "serves"))
        for text in messages
        if words in text
    }
    return layers, found, len(messages)


@pytest.mark.parametrize(
    "kind", [Standard, PGDAT, TRADES, Alternating, RoutingConsistency, SecondRanked]
)
def test_an_expert_that_gets_every_token_is_told_once_for_each_layer_until_it_recovers(kind):
    model, (images, labels) = biased(), batch()
    method = kind(model, EPS, steps=1, alarm=CollapseAlarm(1))
    with pytest.warns(RouterCollapseWarning, match="raise the weights") as caught:
        method(images, labels)
    assert kinds(caught) == ({"moes.0", "moes.1"}, {"dormant", "load"}, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(images, labels)  # nothing new

    torch.manual_seed(0)
    for moe in model.moes:
        moe.router.bias.data[:] = 0
        nn.init.orthogonal_(moe.router.weight, gain=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method(images, labels)
    first = method.alarm.read()["moes.0"]
    assert first.largest_load < 0.9 and first.dormant <= E / 2
    model.moes[0].router.bias.data[1] = 100.0
    with pytest.warns(RouterCollapseWarning) as caught:
        method(images, labels)
    assert "moes.0" in kinds(caught)[0]


def test_inner_attacks_are_not_counted_and_other_steps_count_nothing():
    model, (images, labels) = biased(), batch()
    alarm = CollapseAlarm(3)
    method = PGDAT(model, EPS, steps=4, alarm=alarm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(images, labels)
        method(images, labels)
    assert alarm.read() == {}
    with pytest.warns(RouterCollapseWarning, match="at step 2 "):
        method(images, labels)
    load = alarm.read()["moes.1"]
    assert load == (1.0, E - 1, E, 1, 6 * 4) and list(alarm.read()) == ["moes.0", "moes.1"]


@pytest.mark.parametrize(("top_k", "speaks"), [(2, True), (E, False)])
def test_all_tokens_at_one_expert_are_no_collapse_where_every_expert_has_them(top_k, speaks):
    model, (images, labels) = biased(top_k), batch()
    alarm = CollapseAlarm(1, dormant=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Standard(model, alarm=alarm)(images, labels)
    assert bool(caught) == speaks
    assert alarm.read()["moes.0"].largest_load == 1.0


def test_too_few_choices_and_padding_say_nothing():
    model = biased()
    model.padding = 3  # 6 real tokens for 4 experts
    images, labels = batch()
    method = Standard(model, alarm=CollapseAlarm(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(images, labels)
    assert method.alarm.read()["moes.0"].choices == 6
    with pytest.warns(RouterCollapseWarning):
        method(*batch(count=9))


def test_the_few_tokens_of_one_image_say_nothing():
    model = rows(num_experts=2, router=TopKRouter(6, 2, 1, bias=True, noise_std=0, load_weight=0))
    for moe in model.moes:
        moe.router.bias.data[0] = 100.0
    method = Standard(model, alarm=CollapseAlarm(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(*batch(count=1))  # 4 tokens for 2 experts
    with pytest.warns(RouterCollapseWarning, match="serves 100%"):
        method(*batch(count=2))


class Silent(nn.Module):
    """A router that takes NaN for 0, as none complains on a GPU and in other libraries."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, 6))

    def forward(self, x, *args, **kwargs):
        logits = nn.functional.linear(x, self.weight)
        return RouterOutput(topk_route(logits.nan_to_num(), 2), logits)


def silent():
    return MoE(6, 10, E, 2, router=Silent())


@pytest.mark.parametrize("kind", [Standard, PGDAT, Alternating, SecondRanked])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("entries", [(1, 2), (slice(None), slice(None))])
def test_a_router_that_is_not_finite_is_an_error_that_names_layer_and_step(kind, value, entries):
    model, (images, labels) = rows(), batch()
    method = kind(model, EPS, steps=1, alarm=CollapseAlarm(1, load=1, dormant=1))
    method(images, labels).backward()
    model.moes[1].router.weight.data[entries] = value
    with pytest.raises(NonFiniteRouter, match="weights that are not at step 1") as caught:
        method(images, labels)
    assert (caught.value.layer, caught.value.step) == ("moes.1", 1)
    assert isinstance(caught.value, NonFiniteLoss)


def test_routers_that_take_nan_are_seen_by_the_alarm():
    """On a GPU nothing refuses NaN, and expert 0 has every token."""
    model, (images, _) = rows(make_moe=silent), batch()
    alarm = CollapseAlarm(2, load=1, dormant=1)
    with alarm.watching(model, 1):
        model(images)
    model.moes[1].router.weight.data[0, 0] = torch.nan
    tokens = torch.rand(9, 6, dtype=torch.float64)
    with alarm.watching(model, 2):
        model.moes[1](tokens)
    with (
        pytest.raises(NonFiniteRouter, match=r"'moes\.1' .* weights that are not at step 3"),
        alarm.watching(model, 3),
    ):
        model.moes[1](tokens)


def test_nan_before_a_router_names_the_layer_that_made_it():
    """Routers of this library refuse NaN on CPU, already in the inner attack."""
    model, (images, labels) = rows(), batch()
    model.embed.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="got nan at step 0; the output of 'embed'") as caught:
        PGDAT(model, EPS, steps=1)(images, labels)
    assert not isinstance(caught.value, NonFiniteRouter)


def test_logits_that_are_not_finite_are_seen_too_and_ruled_out_experts_are_not():
    model, (images, _) = rows(make_moe=silent), batch()
    model.embed.weight.data[0] = torch.nan
    with (
        pytest.raises(NonFiniteRouter, match=r"'moes\.0' must be finite, got logits"),
        CollapseAlarm(1).watching(model, 0),
    ):
        model(images)

    ensemble = vmoe(ensemble_size=2).train()  # logits of the other member are −∞
    Standard(ensemble, alarm=CollapseAlarm(1))(torch.rand(4, 1, 8, 8), torch.arange(4))


def test_it_is_on_by_default_and_leaves_dense_models_alone():
    assert isinstance(PGDAT(linear(), EPS).alarm, CollapseAlarm)
    assert PGDAT(linear(), EPS, alarm=None).alarm is None
    alarm = CollapseAlarm(1)
    Standard(linear(), alarm=alarm)(*batch())
    assert alarm.read() == {}


def test_nothing_waits_for_a_gpu_between_two_looks():
    """Fake tensors have no values: an alarm that looked at one would raise an error."""
    with FakeTensorMode():
        model, images = vmoe(), torch.rand(3, 1, 8, 8)
        alarm = CollapseAlarm(2)
        with alarm.watching(model, 0):
            model(images)
        with (
            pytest.raises(Exception, match="_local_scalar_dense"),
            alarm.watching(model, 1),
        ):
            model(images)


def test_the_loss_on_a_gpu_is_read_where_the_alarm_looks(monkeypatch):
    monkeypatch.setattr("ironmoe.attacks.training.method.may_look", lambda tensor: False)
    monkeypatch.setattr("ironmoe.attacks.training.method.may_wait", lambda tensor: True)
    model, (images, labels) = linear(), batch()
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    method = Standard(model, alarm=CollapseAlarm(2))
    assert method(images, labels).isnan()
    with pytest.raises(NonFiniteLoss, match="at step 1"):
        method(images, labels)
    assert Standard(model, alarm=None)(images, labels).isnan()


def test_compiled_models_are_looked_at_after_they_ran_as_compiled_code():
    compiled, tokens = torch.compile(biased().moes[0], backend="eager"), torch.rand(9, 6).double()
    compiled(tokens)
    alarm = CollapseAlarm(1)
    with pytest.warns(RouterCollapseWarning, match="the router of ''"), alarm.watching(compiled, 0):
        compiled(tokens)
    assert alarm.read()[""].choices == 9


def test_a_healthy_model_is_silent_over_a_short_training():
    torch.manual_seed(0)
    model = vmoe().train()
    labels = torch.arange(16) % 4
    images = (torch.rand(4, 1, 8, 8)[labels] + 0.1 * torch.randn(16, 1, 8, 8)).clamp(0, 1)
    method = PGDAT(model, 0.02, steps=1, ramp_steps=20, alarm=CollapseAlarm(40))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            optimizer.zero_grad()
            method(images, labels).backward()
            optimizer.step()
    assert all(load.choices == 16 * 4 * 2 for load in method.alarm.read().values())


@pytest.mark.parametrize("options", [{"every": 0}, {"dormant": 1.5}, {"load": -0.1}])
def test_settings_that_are_none(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        CollapseAlarm(**options)


def send_tokens(model, to):
    """To one expert, or to all of them alike where it is None."""
    torch.manual_seed(0)
    for moe in model.moes:
        moe.router.bias.data[:] = 0
        nn.init.orthogonal_(moe.router.weight, gain=10)
        if to is not None:
            moe.router.bias.data[to] = 100.0


def test_parts_of_a_batch_are_looked_at_together_and_warned_of_once():
    """A part in which all is well does not make the collapse of the next part a new one; a whole
    step in which all is well does."""
    model, (images, labels) = biased(), batch(count=8)
    method = Standard(model, alarm=CollapseAlarm(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for part, to in enumerate((0, None)):
                method.step = step
                send_tokens(model, to)
                method(images[part::2], labels[part::2], slot=part)
    assert kinds(caught) == ({"moes.0", "moes.1"}, {"dormant", "load"}, 4)
    load = method.alarm.read()["moes.0"]
    assert load.choices == 8 * 4 and 0.5 < load.largest_load < 0.9

    method.step = 3
    send_tokens(model, None)
    method(images, labels)
    send_tokens(model, 0)
    with pytest.warns(RouterCollapseWarning, match="at step 4 "):
        method(images, labels)


def test_what_was_said_is_known_after_a_resumption():
    model, (images, labels) = biased(), batch()
    method = Standard(model, alarm=CollapseAlarm(1))
    with pytest.warns(RouterCollapseWarning):
        method(images, labels)
    state = json.loads(json.dumps(method.alarm.state_dict()))
    later = Standard(model, alarm=CollapseAlarm(1))
    later.step = method.step
    later.alarm.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later(images, labels)
