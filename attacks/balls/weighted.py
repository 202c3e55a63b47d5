"""Projections onto a ball inside a box in a metric that weighs each coordinate.

Both find z with the least Σ weight · (z − size)², 0 ≤ z ≤ room, and norm of z at most the radius.
By the KKT conditions z depends on one multiplier λ ≥ 0, coordinate by coordinate, and its norm
falls as λ grows. Between two *breaks*, the λ at which some coordinate leaves its room or becomes 0,
it does so smoothly. A search by halves over the sorted breaks finds the piece with the right λ, and
there λ follows from the coordinates that are free.

All tensors are float64: size, room and weight (B, D), size and room ≥ 0, weight above 0; radius
(B, 1) ≥ 0, inf allowed. Nothing waits for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls.lengths import SHORTEST_STEP

# Newton's method converges in about five steps; from far away it takes some more.
NEWTON_STEPS = 30


@torch.no_grad()
def nearest_in_l1(size: Tensor, room: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
    """(B, D) z = clamp(size − λ / weight, 0, room) with Σz ≤ radius."""

    def at(shift: Tensor) -> Tensor:
        return (size - shift / weight).clamp_min(0).minimum(room)

    inside = at(torch.zeros_like(radius)).sum(1, keepdim=True) <= radius
    gone = weight * size
    unclipped = weight * (size - room).clamp_min(0)
    breaks = torch.cat([gone, unclipped], 1)
    start = _last_beyond(breaks, lambda shift: at(shift).sum(1, keepdim=True), radius)

    free = (gone > start) & (unclipped <= start)
    held = torch.where(free, size, torch.where(unclipped > start, room, 0)).sum(1, keepdim=True)
    rate = torch.where(free, 1 / weight, 0).sum(1, keepdim=True)
    shift = ((held - radius) / rate.clamp_min(SHORTEST_STEP)).maximum(start)

    length = at(torch.where(inside, 0, shift))
    return length * _shrink(length.sum(1, keepdim=True), radius)


@torch.no_grad()
def nearest_in_l2(size: Tensor, room: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
    """(B, D) z = min(size / (1 + λ / weight), room) with ‖z‖₂ ≤ radius."""
    # Divided by the radius, so that squares neither underflow nor overflow.
    unit = torch.where(radius.isinf() | (radius == 0), 1, radius)
    size = size / unit
    room = room / unit

    def at(shift: Tensor) -> Tensor:
        return (size * (weight / (weight + shift))).minimum(room)

    def squares(shift: Tensor) -> Tensor:
        return at(shift).square().sum(1, keepdim=True)

    one = torch.ones_like(radius)
    inside = (squares(torch.zeros_like(radius)) <= 1) | radius.isinf()
    over = (size - room).clamp_min(0) / room.clamp_min(SHORTEST_STEP)
    unclipped = (weight * over).clamp_max(torch.finfo(size.dtype).max)
    start = _last_beyond(unclipped, squares, one)

    # Σ of the free squares as a function of λ: one over its root is concave, so Newton's method
    # comes from below and never goes too far.
    clipped = unclipped > start
    left = (1 - torch.where(clipped, room.square(), 0).sum(1, keepdim=True)).clamp_min(0).sqrt()
    shift = start
    for _ in range(NEWTON_STEPS):
        square = (size * (weight / (weight + shift))).square().masked_fill(clipped, 0)
        whole = square.sum(1, keepdim=True)
        rate = (square / (weight + shift)).sum(1, keepdim=True)
        too_long = whole.sqrt() / left.clamp_min(SHORTEST_STEP) - 1
        further = shift + too_long.clamp_min(0) * whole / rate.clamp_min(SHORTEST_STEP)
        if shift.device.type == "cpu" and torch.equal(further, shift):
            break
        shift = further.maximum(shift)

    length = at(torch.where(inside, 0, shift))
    length = length * _shrink(length.square().sum(1, keepdim=True).sqrt(), one)
    length = torch.where(inside, at(torch.zeros_like(radius)), length) * unit
    return torch.where(radius > 0, length, 0)


def _last_beyond(breaks: Tensor, spent: Callable[[Tensor], Tensor], radius: Tensor) -> Tensor:
    """(B, 1) the largest of 0 and the breaks (B, K) at which ``spent`` is at least the radius; 0
    where there is none."""
    ranked = torch.cat([torch.zeros_like(radius), breaks], 1).sort(dim=1).values
    first = torch.zeros_like(radius, dtype=torch.int64)
    beyond = torch.full_like(first, ranked.shape[1])  # one place further it is less

    for _ in range(ranked.shape[1].bit_length()):
        middle = (first + beyond) // 2
        enough = spent(ranked.gather(1, middle.clamp_max(ranked.shape[1] - 1))) >= radius
        enough = enough & (middle < ranked.shape[1])
        first = torch.where(enough, middle, first)
        beyond = torch.where(enough, beyond, middle)
    return ranked.gather(1, first)


def _shrink(length: Tensor, radius: Tensor) -> Tensor:
    """(B, 1) the factor that takes back what rounding added."""
    return (radius / length.clamp_min(SHORTEST_STEP)).clamp_max(1)
