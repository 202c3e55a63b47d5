"""What a rank of an expert-parallel group sends: bytes, and the share of them that leaves the rank
and the node.

A row travels to the rank that holds its expert and comes back; gates stay where the token is. The
backward pass sends a gradient for each row, the same way, whether weights have gradients or not: a
weight gradient is a sum over rows that are already there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ironmoe.bench.benchmarks.passes import DX, FORWARD, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.layers import Layer, World
from ironmoe.moe.exchange.agreement import Header

INT64 = 8  # bytes
ROUND_TRIPS = {INFERENCE: 1, FORWARD: 1, DX: 2, FULL: 2}  # of rows, or of their gradients


class Sent(NamedTuple):
    """Bytes that one rank hands to all-to-alls: all, those for other ranks, those for other
    nodes."""

    handed: float
    to_others: float
    off_node: float


def sent_rows(layer: Layer, world: World, pass_name: str) -> Sent:
    """What the mean rank sends in one pass if every rank receives as many rows. There and back are
    two exchanges, of R rows each."""
    if world.ranks == 1:
        return Sent(0.0, 0.0, 0.0)
    handed = float(2 * ROUND_TRIPS[pass_name] * layer.shape.rows * layer.row_bytes)
    return Sent(handed, handed * world.leaves_rank, handed * world.leaves_node)


def exchanges(pass_name: str) -> int:
    """How many exchanges a rank takes part in: of rows, and one of counts ahead of them."""
    return 2 * ROUND_TRIPS[pass_name] + 1


def counts_bytes(num_experts: int, ranks: int) -> int:
    """Bytes that a rank tells the others ahead of the rows, whatever the pass: for each of their
    experts how many rows will come, and what ranks must agree on."""
    return (ranks - 1) * (num_experts // ranks + len(Header._fields)) * INT64


def handed_bytes(
    rows_to: Sequence[int], rows_from: Sequence[int], row_bytes: int, pass_name: str
) -> int:
    """Bytes that one rank hands to the all-to-alls of rows in one pass, its own rows included.

    Args:
        rows_to: rows that its tokens send to each rank; rows_from: rows that its experts get from
            each rank.
    """
    return ROUND_TRIPS[pass_name] * (sum(rows_to) + sum(rows_from)) * row_bytes


def bytes_between(
    rows_to: Sequence[int], rows_from: Sequence[int], row_bytes: int, pass_name: str, *, rank: int
) -> int:
    """Those of ``handed_bytes`` that go to other ranks."""
    others = [
        there + back
        for other, (there, back) in enumerate(zip(rows_to, rows_from, strict=True))
        if other != rank
    ]
    return ROUND_TRIPS[pass_name] * sum(others) * row_bytes
