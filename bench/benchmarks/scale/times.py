"""How long a layer takes with expert parallelism: experts, exchanges, rows that are moved, and what
shared experts hide of the exchanges.

Products take the time of the roofline (``roofline.py``): FLOPs or bytes, whichever takes longer, so
that the reading of weights counts where an expert has few rows.
"""

from typing import NamedTuple

from ironmoe.bench.benchmarks.gpus import Gpu, Rates
from ironmoe.bench.benchmarks.passes import FORWARD, INFERENCE
from ironmoe.bench.benchmarks.roofline import combine_work, layer_work, limit_ms
from ironmoe.bench.benchmarks.scale.exchange import ROUND_TRIPS, sent_rows
from ironmoe.bench.benchmarks.scale.layers import BFLOAT16, Layer, World
from ironmoe.bench.benchmarks.scale.links import Links
from ironmoe.bench.benchmarks.shapes import Shape


class Machine(NamedTuple):
    """A GPU, the rates at which it is taken, and what joins it to others."""

    gpu: Gpu
    rates: Rates
    links: Links


class LayerTime(NamedTuple):
    """Milliseconds of one pass on the busiest rank.

    experts: products of routed experts, with their own moving of rows; moving: rows that are put
    in the order of ranks, and gathered from it; exchange: all-to-alls, with that of counts; shared:
    experts that every token takes; hidden: the part of the exchange that they run beside.
    """

    experts: float
    moving: float
    exchange: float
    shared: float
    hidden: float

    @property
    def total(self) -> float:
        return self.experts + self.moving + self.exchange + self.shared - self.hidden

    @property
    def ratio(self) -> float:
        """The exchange that nothing hides, divided by the time of all experts."""
        return (self.exchange - self.hidden) / (self.experts + self.shared)


def layer_time(layer: Layer, world: World, pass_name: str, machine: Machine) -> LayerTime:
    """The time of one layer whose experts are spread over the ranks of ``world``."""
    shared = shared_ms(layer, pass_name, machine)
    if world.ranks == 1:
        return LayerTime(whole_ms(layer, pass_name, machine), 0.0, 0.0, shared, 0.0)

    experts = limit_ms(local_shape(layer, world), pass_name, machine.rates, machine.gpu.chip)
    exchange = exchange_ms(layer, world, pass_name, machine.links)
    moving = ROUND_TRIPS[pass_name] * _moving_ms(layer.shape, machine.rates)
    hidden = hidden_ms(layer, world, pass_name, machine)
    return LayerTime(experts, moving, exchange, shared, hidden)


def whole_ms(layer: Layer, pass_name: str, machine: Machine) -> float:
    """Milliseconds of all experts on one rank, for its own tokens."""
    return limit_ms(layer.shape, pass_name, machine.rates, machine.gpu.chip)


def shared_ms(layer: Layer, pass_name: str, machine: Machine) -> float:
    """Milliseconds of the products of the experts that every token takes."""
    if not layer.shared:
        return 0.0
    dense = layer.shape._replace(hidden=layer.shared, num_experts=1, top_k=1)
    works = layer_work(dense, pass_name, machine.gpu.chip)
    return sum(work.ms_at(*machine.rates) for work in works if work.flops)


def local_shape(layer: Layer, world: World) -> Shape:
    """What the experts of the busiest rank get: rows of all ranks, each with one choice."""
    shape = layer.shape
    return shape._replace(
        tokens=round(shape.rows * world.busiest),
        num_experts=shape.num_experts // world.ranks,
        top_k=1,
    )


def exchange_ms(layer: Layer, world: World, pass_name: str, links: Links) -> float:
    """Milliseconds of all exchanges of one pass: rows go there and come back, their gradients too,
    and counts travel ahead of them. These are so few that only their latency counts."""
    ways = 2 * ROUND_TRIPS[pass_name]
    return ways * one_way_ms(layer, world, links) + _latency_ms(world, links)


def one_way_ms(layer: Layer, world: World, links: Links) -> float:
    """Milliseconds in which rows travel to the experts, or back from them, at the rank that
    receives most. Bytes inside the node and to other nodes travel at the same time."""
    sent = sent_rows(layer, world, INFERENCE)  # there and back
    in_node = (sent.to_others - sent.off_node) / links.nvlink
    seconds = world.busiest * max(in_node, sent.off_node / links.network) / 2 * 1e-9
    return seconds * 1e3 + _latency_ms(world, links)


def hidden_ms(layer: Layer, world: World, pass_name: str, machine: Machine) -> float:
    """Milliseconds of the exchanges that shared experts run beside. In the forward pass they work
    while rows travel to the experts, in the backward pass while the gradients of these rows come
    back. Nothing works beside the other ways and the counts."""
    forward = shared_ms(layer, INFERENCE if pass_name == INFERENCE else FORWARD, machine)
    backward = shared_ms(layer, pass_name, machine) - forward
    one_way = one_way_ms(layer, world, machine.links)
    return min(forward, one_way) + min(backward, one_way)


def _latency_ms(world: World, links: Links) -> float:
    step = links.nvlink_us if world.nodes == 1 else links.network_us
    return (links.start_us + step) * 1e-3


def _moving_ms(shape: Shape, rates: Rates) -> float:
    """Rows are gathered into the order of ranks; those that come back are added up by token."""
    gathered = 2 * shape.rows * shape.dim * BFLOAT16
    return gathered / rates.terabytes * 1e-9 + combine_work(shape).ms_at(*rates)
