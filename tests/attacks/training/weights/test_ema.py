"""The average of weights against its recursion, and what it leaves as it is."""

import copy

import pytest
import torch
from torch import nn
from training_toys import vmoe

from ironmoe.attacks.training import EMA
from ironmoe.moe import update_selection_bias


def model_with_state():
    router = {"selection_bias": True, "balance": "global_batch", "balance_weight": 0.1}
    model = vmoe(router=router)
    return nn.Sequential(nn.BatchNorm2d(1), model).train()


def step(model):
    """Random weights; buffers and counters change by a pass in training mode."""
    model(torch.rand(4, 1, 8, 8))
    update_selection_bias(model, 0.1)
    model(torch.rand(4, 1, 8, 8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))


def test_the_average_is_the_recursion():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay=0.4)
    expected = model.weight.detach().clone()
    for t in range(12):  # (1 + t) / (10 + t) passes 0.4 at t = 5
        nn.init.normal_(model.weight)
        ema.update()
        decay = min(0.4, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    with ema.applied() as averaged:
        assert torch.allclose(averaged.weight, expected, rtol=1e-13)


def test_bfloat16_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.999)
    ema.updates = 10**6
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):  # each moves it by less than bfloat16 tells
        ema.update()
    (average,) = (value for name, value in ema.state_dict().items() if name != "updates")
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(2 - 0.999**100, rel=1e-5)


def test_buffers_and_counters_are_copied_and_not_averaged():
    torch.manual_seed(0)
    model = model_with_state()
    ema = EMA(model)
    other = model_with_state()
    for _ in range(3):
        step(model)
        ema.update()
    ema.copy_to(other)
    for (name, expected), found in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(expected, found), name
    router, copied = model[1].blocks[0].mlp.router, other[1].blocks[0].mlp.router
    assert router.choices.sum() > 0 and torch.equal(router.choices, copied.choices)
    assert torch.equal(router.global_load.counts, copied.global_load.counts)
    copied.choices.zero_()
    assert router.choices.any()
    with ema.applied():
        averaged = list(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(averaged, other.parameters(), strict=True))
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_weights_come_back_bit_for_bit_after_an_error_too():
    torch.manual_seed(0)
    model = model_with_state()
    ema = EMA(model)
    step(model)
    ema.update()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), ema.applied():
        assert not torch.equal(model[1].head.weight, before["1.head.weight"])
        raise KeyError
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_saved_continues_and_compiled_or_not_it_has_the_same_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    ema = EMA(model)
    nn.init.normal_(model[0].weight)
    ema.update()
    later = EMA(nn.Sequential(torch.compile(model[0]), model[1]))
    later.load_state_dict(ema.state_dict())
    nn.init.normal_(model[1].weight)
    ema.update()
    later.update()
    state, again = ema.state_dict(), later.state_dict()
    assert state["updates"] == again["updates"] == 2
    assert all(torch.equal(state[n], again[n]) for n in state if n != "updates")
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    EMA(torch.compile(model)).copy_to(plain)
    assert torch.equal(plain[0].weight, model[0].weight)


def test_an_autocast_around_it_meets_the_averages():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    ema = EMA(model)
    with torch.no_grad():
        model.weight.add_(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = model(x)
        with ema.applied():
            averaged = model(x)
        again = model(x)
    assert not torch.equal(live, averaged) and torch.equal(live, again)


def test_bad_input():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        EMA(model, decay=1.0)
    ema = EMA(model)
    with pytest.raises(ValueError, match="model must have the weights of the averaged model"):
        ema.copy_to(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="state must have the weights"):
        ema.load_state_dict(EMA(nn.Linear(3, 2, bias=False)).state_dict())
    with ema.applied(), pytest.raises(RuntimeError, match="inside applied"):
        ema.update()


def test_another_weight_in_the_model_is_an_error():
    model = nn.Sequential(nn.Linear(3, 2))
    ema = EMA(model)
    model.append(nn.Linear(2, 2))
    for use in (ema.update, lambda: ema.applied().__enter__()):
        with pytest.raises(ValueError, match=r"model must have the weights .* difference in 1\.b"):
            use()
