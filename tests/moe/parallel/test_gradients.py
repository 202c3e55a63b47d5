"""What ``average_gradients`` hands to torch.distributed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ironmoe.moe.parallel import gradients

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
