"""One number of GPUs, laid out as expert-parallel groups of several sizes: which layout is the
fastest whose memory suffices.

The groups are replicas of each other, which add up the gradients of their experts after the
backward pass (``average_gradients``), or FSDP2 shares the weights of each expert out among the
groups. A group has GPUs of one node as far as it can: it is the inner dimension of the mesh.
"""

from typing import NamedTuple

from ironmoe.bench.benchmarks.scale.alternatives import communication_seconds
from ironmoe.bench.benchmarks.scale.layers import Layer, World
from ironmoe.bench.benchmarks.scale.memory import experts_gb
from ironmoe.bench.benchmarks.scale.times import Machine, layer_time
from ironmoe.bench.benchmarks.scale.ways import FSDP2, REPLICAS

ONE_GROUP = "one group"


class Layout(NamedTuple):
    """One way to lay out the GPUs.

    ranks: of an expert-parallel group, 1 being without; between: what groups do, ``REPLICAS`` or
    ``FSDP2``, or ``ONE_GROUP``; ms: of one layer; gigabytes: of all layers, on a GPU.
    """

    ranks: int
    between: str
    ms: float
    gigabytes: float


def layouts(
    layer: Layer, gpus: int, world: World, pass_name: str, machine: Machine
) -> list[Layout]:
    """Every layout of so many GPUs into groups whose size divides E and the GPUs.

    Args:
        world: the GPUs of a node, and the imbalance; its ranks are not asked.
    """
    sizes = [
        ranks
        for ranks in range(1, gpus + 1)
        if gpus % ranks == 0 and layer.shape.num_experts % ranks == 0
    ]
    return [
        _layout(layer, gpus // ranks, world._replace(ranks=ranks), pass_name, machine, between)
        for ranks in sizes
        for between in ((REPLICAS, FSDP2) if ranks < gpus else (ONE_GROUP,))
    ]


def best(found: list[Layout], gigabytes: float) -> Layout | None:
    """The fastest that fits; None if none does."""
    fitting = [layout for layout in found if layout.gigabytes <= gigabytes]
    return min(fitting, key=lambda layout: layout.ms, default=None)


def _layout(
    layer: Layer, groups: int, world: World, pass_name: str, machine: Machine, between: str
) -> Layout:
    """FSDP2 communicates beside the rest, which counts where it is longer. Where both it and the
    rows need NVLink, or both the network, one waits for the other."""
    time = layer_time(layer, world, pass_name, machine)
    ms = time.total
    if between != ONE_GROUP:
        same_experts = World(groups, max(world.node // world.ranks, 1))
        held = layer.with_experts(layer.shape.num_experts // world.ranks)
        links = machine.links
        other = communication_seconds(between, held, same_experts, pass_name, links) * 1e3
        one_link = world.nodes > 1 or same_experts.nodes == 1
        on_link = other + (time.exchange if one_link else 0.0)
        ms = max(ms, on_link) if between == FSDP2 else ms + other

    shards = groups if between == FSDP2 else 1
    return Layout(world.ranks, between, ms, experts_gb(layer, world, pass_name, shards=shards))
