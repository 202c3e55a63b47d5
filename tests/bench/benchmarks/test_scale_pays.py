"""Which way is the fastest, and up to how many tokens, experts and ranks expert parallelism is."""

import pytest

from ironmoe.bench.benchmarks.gpus import GPUS
from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale import alternatives
from ironmoe.bench.benchmarks.scale.alternatives import (
    experts_where_fastest,
    fastest,
    ranks_until,
    ranks_where_fastest,
    tokens_until,
    way_ms,
)
from ironmoe.bench.benchmarks.scale.layers import LAYERS, World
from ironmoe.bench.benchmarks.scale.links import LINKS, changed
from ironmoe.bench.benchmarks.scale.memory import fits
from ironmoe.bench.benchmarks.scale.times import Machine
from ironmoe.bench.benchmarks.scale.ways import EP, FSDP2, REPLICAS

H100 = GPUS["h100"]
MACHINE = Machine(H100, H100.peak, LINKS["h100"])
REACHED = MACHINE._replace(rates=H100.reached)
PASSES = (INFERENCE, DX, FULL)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("other", [FSDP2, REPLICAS])
@pytest.mark.parametrize("layer", LAYERS, ids=[layer.shape.name for layer in LAYERS])
def test_the_number_of_tokens_is_the_last_at_which_expert_parallelism_wins(layer, other, pass_name):
    case = World(8), pass_name, MACHINE
    tokens = tokens_until(other, layer, *case)

    def wins(tokens):
        of = layer.with_tokens(tokens)
        return way_ms(EP, of, *case) < way_ms(other, of, *case)

    assert wins(tokens) and not wins(tokens + 1) and not wins(4 * tokens)


def test_a_search_without_an_end_or_a_beginning_says_so():
    assert alternatives._last(lambda tokens: True, 1024) is None
    assert alternatives._last(lambda tokens: False, 1024) == 0
    assert [
        alternatives._last(lambda n, most=most: n <= most, 1024) for most in (1, 2, 3, 700)
    ] == [
        1,
        2,
        3,
        700,
    ]


def test_the_fastest_way_is_one_that_fits():
    layer, world = LAYERS[0], World(8)
    assert fastest(layer, world, DX, MACHINE) == REPLICAS  # an attack sends no weights
    small = MACHINE._replace(links=changed(MACHINE.links, memory_gb=5.0))
    assert not fits(REPLICAS, layer, world, DX, 5.0) and fits(EP, layer, world, DX, 5.0)
    assert fastest(layer, world, DX, small) == EP
    nothing = MACHINE._replace(links=changed(MACHINE.links, memory_gb=0.1))
    assert fastest(layer, world, DX, nothing) is None
    assert experts_where_fastest(layer, world, DX, nothing) is None


def test_the_numbers_of_experts_end_where_another_way_wins_or_nothing_fits():
    layer, world = LAYERS[0], World(8)
    least, most = experts_where_fastest(layer, world, DX, MACHINE)
    for number, way in ((least, EP), (most, EP), (least // 2, REPLICAS)):
        assert fastest(layer.with_experts(number), world, DX, MACHINE) == way
    assert not fits(EP, layer.with_experts(2 * most), world, DX, MACHINE.links.memory)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=[layer.shape.name for layer in LAYERS])
def test_the_numbers_of_ranks_are_the_first_and_the_last_on_which_expert_parallelism_wins(
    layer, pass_name
):
    world = World(1)
    divisors = [n for n in range(2, 257) if layer.shape.num_experts % n == 0]
    won = [n for n in divisors if fastest(layer, World(n), pass_name, REACHED) == EP]
    expected = (won[0], won[-1]) if won else None
    assert ranks_where_fastest(layer, world, pass_name, REACHED) == expected
    for other in (FSDP2, REPLICAS):
        most = ranks_until(other, layer, world, pass_name, REACHED)
        for ranks in divisors:
            case = layer, World(ranks), pass_name, REACHED
            wins = way_ms(EP, *case) < way_ms(other, *case)
            assert wins if ranks == most else not (wins and ranks > most)


def test_numbers_of_ranks_depend_on_memory_and_on_the_number_of_rows():
    layer, world = LAYERS[0], World(8)
    assert ranks_where_fastest(layer, world, FULL, REACHED) == (2, 16)
    tokens = tokens_until(REPLICAS, layer, World(32), FULL, REACHED)
    few, many = (layer.with_tokens(number) for number in (tokens, tokens + 1))
    assert ranks_until(REPLICAS, few, world, FULL, REACHED) == 32
    assert ranks_until(REPLICAS, many, world, FULL, REACHED) == 16
    small = REACHED._replace(links=changed(REACHED.links, memory_gb=8.0))
    least, most = ranks_where_fastest(layer, world, FULL, small)
    assert least == most == 16 and not fits(EP, layer, World(8), FULL, 8.0)
    nothing = REACHED._replace(links=changed(REACHED.links, memory_gb=0.1))
    assert ranks_where_fastest(layer, world, FULL, nothing) is None
    assert ranks_until(REPLICAS, layer, world, DX, REACHED) == 0  # an attack sends no weights
