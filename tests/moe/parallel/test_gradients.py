"""What ``average_gradients`` hands to torch.distributed."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ironmoe.moe import MoE
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.parallel import gradients
from ironmoe.moe.parallel.parallelize import TOLD

ORDER = (torch.bfloat16, torch.float64, torch.float32, torch.float16)


@pytest.mark.parametrize("order", [ORDER, ORDER[::-1]])
def test_dtypes_travel_in_the_order_of_the_weights(order, monkeypatch):
    """Ranks that are separate programs have sets in different orders: they would add one dtype to
    another. So no set may decide."""
    weights = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (*order, *order)]
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, number)
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda values, **_: sent.append(values.clone()))

    gradients._reduce(weights, [None], 1)
    found, *buckets = sent
    assert found.tolist() == [1] * 8
    pairs = [[number] * 3 + [number + 4] * 3 for number in range(4)]
    assert [bucket.tolist() for bucket in buckets] == pairs


def test_a_copy_of_a_model_knows_what_parallelize_was_told():
    model = nn.Linear(2, 2)
    assert gradients._agreed_gradients(model, None) == "mean"
    setattr(model, TOLD, "sum")
    for each in (model, copy.deepcopy(model)):
        assert gradients._agreed_gradients(each, None) == "sum"
        with pytest.raises(ValueError, match="gradients must be 'sum', as parallelize was told"):
            gradients._agreed_gradients(each, "mean")


def test_layers_and_wrapped_models_know_it_too():
    """Else experts would keep their sums, and other weights would be divided."""
    layer = MoE(4, 4, 2)
    layer.expert_parallel = ExpertParallel(SimpleNamespace(size=2, rank=0), 2, gradients="sum")
    assert gradients._agreed_gradients(nn.Sequential(nn.Linear(4, 4), layer), None) == "sum"
    with pytest.raises(ValueError, match="gradients must be 'sum'"):
        gradients._agreed_gradients(layer, "mean")

    model = nn.Linear(2, 2)
    setattr(model, TOLD, "sum")
    assert gradients._agreed_gradients(nn.Sequential(model), None) == "sum"
    other = copy.deepcopy(model)
    setattr(other, TOLD, "mean")
    with pytest.raises(ValueError, match=r"one value of gradients, got \['mean', 'sum'\]"):
        gradients._agreed_gradients(nn.Sequential(model, other), None)
