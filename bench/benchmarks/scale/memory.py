"""Memory of a rank: weights, gradients, AdamW's states, and what the gradient contract keeps of the
MoE layers for a backward pass (docs/architecture.md).

Not counted: what other layers keep, buffers of exchanges, copies that live for one layer, and the
allocator's loss.
"""

from typing import NamedTuple

from ironmoe.bench.benchmarks.passes import FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.layers import BFLOAT16, Layer, World
from ironmoe.bench.benchmarks.scale.ways import EP, FSDP2

FROZEN = BFLOAT16  # bytes of a weight under attack and in evaluation
WEIGHT, GRADIENT, ADAMW = 4, 4, 8  # bytes in training: float32, and two float32 states
TRAINED = WEIGHT + GRADIENT + ADAMW
INDEX = 4  # bytes of an index, and of a gate
INDICES = 4  # of a row: its expert, its place, its token and its choice
GIGA = 1e9


class Kept(NamedTuple):
    """Bytes that one MoE layer keeps for the backward pass on one rank.

    hidden: H, or with recompute the rows that it is computed from; rows: those that first layers
    need for their weight gradients; home: rows that came back from other ranks, for the gradients
    of gates; gates: gates and indices.
    """

    hidden: int
    rows: int
    home: int
    gates: int

    @property
    def total(self) -> int:
        return sum(self)


def kept(layer: Layer, world: World, *, trained: bool, recompute: bool = False) -> Kept:
    """What is kept of the routed experts on the busiest rank.

    Args:
        trained: weights have gradients; else the input alone has.
        recompute: H is computed again from the rows.
    """
    shape = layer.shape
    alone = world.ranks == 1
    received = shape.rows if alone else round(shape.rows * world.busiest)
    arrived = (shape.tokens if alone else received) * layer.row_bytes
    hidden = arrived if recompute else received * shape.wide * layer.itemsize

    of_row = (1 + INDICES) * INDEX
    return Kept(
        hidden=hidden,
        rows=arrived if trained and not recompute else 0,
        home=0 if alone else shape.rows * layer.row_bytes,
        gates=of_row * (received if alone else received + shape.rows),
    )


class RankMemory(NamedTuple):
    """Bytes on one rank that hold parameters and what belongs to them."""

    weights: float
    gradients: float = 0.0
    states: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


def attack_memory(experts: int, rest: int, world: World) -> RankMemory:
    """Frozen weights in bfloat16: the rank's share of the experts, and all others whole.

    Args:
        experts, rest: numbers of parameters.
    """
    return RankMemory(FROZEN * (experts / world.ranks + rest))


def training_memory(experts: int, rest: int, world: World) -> RankMemory:
    """Float32 weights, gradients and AdamW's two states: the rank's share of the experts by expert
    parallelism, and of all others by FSDP2 over the same ranks."""
    numbers = (experts + rest) / world.ranks
    return RankMemory(WEIGHT * numbers, GRADIENT * numbers, ADAMW * numbers)


def experts_gb(layer: Layer, world: World, pass_name: str, *, shards: int = 1) -> float:
    """10⁹ bytes on a rank: the experts of all layers of the model, and what these layers keep for a
    backward pass.

    Args:
        world: over which expert parallelism spreads the experts; a world of one rank is without it.
        shards: over so many ranks FSDP2 shares out each weight that expert parallelism left whole.
    """
    trained = pass_name == FULL
    numbers = layer.expert_numbers // world.ranks
    held = layer.repeats * numbers * (TRAINED if trained else FROZEN) / shards
    if shards > 1:
        held += 2 * numbers * BFLOAT16  # gathered: the layer at work, and the next one
    if pass_name != INFERENCE:
        held += layer.repeats * kept(layer, world, trained=trained).total
    return held / GIGA


def fits(way: str, layer: Layer, world: World, pass_name: str, gigabytes: float) -> bool:
    """Whether ``experts_gb`` of a way on the ranks of ``world`` is no more than a rank has."""
    if way == EP:
        return experts_gb(layer, world, pass_name) <= gigabytes
    shards = world.ranks if way == FSDP2 else 1
    return experts_gb(layer, World(1), pass_name, shards=shards) <= gigabytes
