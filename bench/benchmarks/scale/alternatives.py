"""Expert parallelism beside what one could do without it: FSDP2, which gathers the weights of all
experts for each layer, and replicas, which hold them all.

The alternatives are taken at their best: their communication runs beside the products of the layer
and takes time only where it is longer than these. Expert parallelism waits for its exchanges,
except where shared experts hide them.
"""

from collections.abc import Callable

from ironmoe.bench.benchmarks.passes import FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.layers import BFLOAT16, Layer, World
from ironmoe.bench.benchmarks.scale.links import Links
from ironmoe.bench.benchmarks.scale.memory import fits
from ironmoe.bench.benchmarks.scale.times import Machine, layer_time, shared_ms, whole_ms
from ironmoe.bench.benchmarks.scale.ways import EP, FSDP2, REPLICAS, WAYS

FLOAT32 = 4  # bytes of a weight gradient that is reduced
MOST_TOKENS = 2**22  # a rank; where a way is faster up to these, it always is
MOST_EXPERTS = 2**14


def way_ms(way: str, layer: Layer, world: World, pass_name: str, machine: Machine) -> float:
    """Milliseconds of one layer in one pass, in a way of ``WAYS``."""
    if way == EP:
        return layer_time(layer, world, pass_name, machine).total
    products = whole_ms(layer, pass_name, machine) + shared_ms(layer, pass_name, machine)
    seconds = communication_seconds(way, layer, world, pass_name, machine.links)
    return max(products, seconds * 1e3)


def fastest(layer: Layer, world: World, pass_name: str, machine: Machine) -> str | None:
    """The fastest way whose memory suffices for all layers of the model; None where no way's
    does."""
    ways = [way for way in WAYS if fits(way, layer, world, pass_name, machine.links.memory)]
    return min(ways, key=lambda way: way_ms(way, layer, world, pass_name, machine), default=None)


def tokens_until(
    other: str, layer: Layer, world: World, pass_name: str, machine: Machine
) -> int | None:
    """The largest number of tokens a rank at which expert parallelism is faster than ``other``: 0
    if it never is, None if it is at ``MOST_TOKENS``, too. Memory is not asked."""

    def wins(tokens: int) -> bool:
        of = layer.with_tokens(tokens)
        ours = way_ms(EP, of, world, pass_name, machine)
        return ours < way_ms(other, of, world, pass_name, machine)

    return _last(wins, MOST_TOKENS)


def experts_where_fastest(
    layer: Layer, world: World, pass_name: str, machine: Machine
) -> tuple[int, int] | None:
    """The smallest and the largest number of experts with which expert parallelism is the fastest
    way that fits, out of the ranks times a power of two; None if it is with none."""
    numbers = []
    number = world.ranks
    while number <= MOST_EXPERTS:
        numbers.append(number)
        number *= 2
    won = [
        number
        for number in numbers
        if number >= layer.shape.top_k
        and fastest(layer.with_experts(number), world, pass_name, machine) == EP
    ]
    return (won[0], won[-1]) if won else None


def ranks_where_fastest(
    layer: Layer, world: World, pass_name: str, machine: Machine
) -> tuple[int, int] | None:
    """The smallest and the largest number of ranks on which expert parallelism is the fastest way
    that fits, out of the divisors of E from 2; None if it is on none.

    Args:
        world: the GPUs of a node, and the imbalance; its ranks are not asked.
    """
    won = [
        each.ranks
        for each in _worlds(layer, world)
        if fastest(layer, each, pass_name, machine) == EP
    ]
    return (won[0], won[-1]) if won else None


def ranks_until(other: str, layer: Layer, world: World, pass_name: str, machine: Machine) -> int:
    """The largest number of ranks, out of the divisors of E, on which expert parallelism is faster
    than ``other``; 0 if it never is. Memory is not asked, nor are the ranks of ``world``."""
    won = [
        each.ranks
        for each in _worlds(layer, world)
        if way_ms(EP, layer, each, pass_name, machine)
        < way_ms(other, layer, each, pass_name, machine)
    ]
    return max(won, default=0)


def _worlds(layer: Layer, world: World) -> list[World]:
    """From two ranks to a rank for each expert; each rank has as many experts as the others."""
    num_experts = layer.shape.num_experts
    divisors = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
    return [world._replace(ranks=ranks) for ranks in divisors]


def communication_seconds(
    way: str, layer: Layer, world: World, pass_name: str, links: Links
) -> float:
    """Seconds that the weights of the experts, or their gradients, travel.

    FSDP2 gathers weights in bfloat16 for the forward and again for the backward pass, and shares
    out the sums of their gradients in float32; replicas add these up, which is both.
    """
    gathered = _ring_seconds(layer.expert_numbers * BFLOAT16, world, links)
    reduced = _ring_seconds(layer.expert_numbers * FLOAT32, world, links)
    if way == REPLICAS:
        return 2 * reduced if pass_name == FULL else 0.0
    assert way == FSDP2
    return gathered * (1 if pass_name == INFERENCE else 2) + reduced * (pass_name == FULL)


def _ring_seconds(whole: int, world: World, links: Links) -> float:
    """An all-gather to, or a reduce-scatter from, ``whole`` bytes, by rings as NCCL has them: a
    node takes each byte in once, and its GPUs share that among their network cards."""
    inside = whole * world.leaves_rank / links.nvlink
    across = whole * (world.nodes - 1) / world.nodes / min(world.node, world.ranks) / links.network
    steps = (world.ranks - world.nodes) * links.nvlink_us + (world.nodes - 1) * links.network_us
    return max(inside, across) * 1e-9 + (links.start_us + steps) * 1e-6 * (world.ranks > 1)


def _last(holds: Callable[[int], bool], most: int) -> int | None:
    """The largest number up to which a condition holds that holds for small numbers and then no
    longer: powers of two, then halves between the last that holds and the next."""
    low = 0
    power = 1
    while power <= most:
        if holds(power):
            low = power
        power *= 2
    if low == 0:
        return 0
    if 2 * low > most:
        return None
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
