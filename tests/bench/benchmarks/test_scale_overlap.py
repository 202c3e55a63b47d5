"""What the cost model lets shared experts hide is what they run beside in a layer."""

import pytest
import torch

from ironmoe.bench.benchmarks.gpus import GPUS
from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.gloo import RUNS
from ironmoe.bench.benchmarks.scale.layers import DEEPSEEK, LAYERS, World
from ironmoe.bench.benchmarks.scale.links import LINKS
from ironmoe.bench.benchmarks.scale.times import (
    Machine,
    exchange_ms,
    layer_time,
    one_way_ms,
    shared_ms,
)
from ironmoe.moe import MoE
from ironmoe.moe.exchange.expert_parallel import ExpertParallel

H100 = GPUS["h100"]
MACHINE = Machine(H100, H100.reached, LINKS["h100"])
PASSES = (INFERENCE, DX, FULL)
WORLDS = (World(8), World(16, imbalance=1.5))


class OneRank:
    """A group of this process alone, which notes when exchanges begin and end."""

    rank, size = 0, 1

    def __init__(self):
        self.events = []

    def start_rows(self, received, rows, receive, send, kind):
        received.copy_(rows)
        self.events.append(f"{kind} leave")

    def finish_rows(self, work):
        self.events.append("arrive")


def events_of(pass_name, bound):
    """What happens in one pass of a layer with a shared expert, in its order."""
    group = OneRank()
    layer = MoE(8, 12, 4, 2, shared_dim=6, shared_gate=True).eval()
    layer.expert_parallel = ExpertParallel(group, 4, max_tokens_per_rank=bound)
    layer.shared.register_forward_hook(lambda *_: group.events.append("shared"))
    layer.shared.register_full_backward_hook(lambda *_: group.events.append("shared, backward"))
    RUNS[pass_name](layer, torch.randn(5, 8))
    return group.events


@pytest.mark.parametrize("bound", [None, 16])
@pytest.mark.parametrize("pass_name", PASSES)
def test_in_a_layer_shared_experts_work_beside_one_way_of_each_direction(pass_name, bound):
    way = ["rows leave", "arrive"]
    forward = ["counts leave", "arrive", "rows leave", "shared", "arrive", *way]
    backward = [*way, "rows leave", "shared, backward", "arrive"]
    expected = forward if pass_name == INFERENCE else forward + backward
    assert events_of(pass_name, bound) == expected


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("pass_name", PASSES)
def test_the_longest_shared_experts_hide_one_way_of_each_direction(pass_name, world):
    """All but the way back and the exchange of counts; of a backward pass, one way of two."""
    time = layer_time(DEEPSEEK._replace(shared=10**7), world, pass_name, MACHINE)
    one_way = one_way_ms(DEEPSEEK, world, MACHINE.links)
    directions = 1 if pass_name == INFERENCE else 2
    assert time.hidden == pytest.approx(directions * one_way)
    counts = exchange_ms(DEEPSEEK.with_tokens(0), world, INFERENCE, MACHINE.links) / 3
    assert time.exchange - time.hidden == pytest.approx(directions * one_way + counts)
    assert time.ratio > 0


@pytest.mark.parametrize("pass_name", PASSES)
def test_short_shared_experts_hide_as_much_as_they_last(pass_name):
    none, some, more = (DEEPSEEK._replace(shared=width) for width in (0, 64, 128))
    times = [layer_time(layer, World(8), pass_name, MACHINE) for layer in (none, some, more)]
    assert times[0].hidden == times[0].shared == 0
    for time in times[1:]:
        assert time.hidden == pytest.approx(time.shared) and time.hidden < time.exchange
    assert times[0].ratio > times[1].ratio > times[2].ratio


def test_a_direction_hides_no_more_than_its_own_shared_experts_last():
    """In a full pass the products of the backward pass are longer than its way, those of the
    forward pass are not: the rest of the former hides nothing of the latter."""
    way = one_way_ms(DEEPSEEK, World(8), MACHINE.links)
    for width in range(512, 8192, 64):
        layer = DEEPSEEK._replace(shared=width)
        forward, full = (shared_ms(layer, name, MACHINE) for name in (FORWARD, FULL))
        if forward < way < full - forward:
            break
    else:
        pytest.fail("no width lies between")
    assert layer_time(layer, World(8), FULL, MACHINE).hidden == pytest.approx(forward + way)


def test_without_shared_experts_nothing_is_hidden():
    for layer in LAYERS[:2]:
        assert layer_time(layer, World(16), FULL, MACHINE).hidden == 0
