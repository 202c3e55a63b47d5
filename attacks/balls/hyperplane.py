"""The nearest point of a hyperplane inside the image box (Croce & Hein, arXiv 1907.02044).

A linear function changes the most, for the length of the step, if each pixel moves with or against
the sign of its weight. How far each one moves is a matter of the norm: all pixels at once, each at
a speed of its own (``all_at_once``), or one after another (``one_after_another``). A pixel that
meets its face of the box stays there. So there is one number to find, how far the others go.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls.elements import Box
from ironmoe.attacks.balls.lengths import divisor

FAR = 1e30  # room of a pixel without bounds, so that sums stay finite

Moves = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(size (B, D), room (B, D), needed (B, 1)) → (B, D): how far each pixel moves, at most its room,
so that Σ size · step = needed; all of the room where that is too little."""


@torch.no_grad()
def step_to_hyperplane(
    point: Tensor, weight: Tensor, value: Tensor, bounds: Box, moves: Moves
) -> Tensor:
    """``HyperplaneBall.step_to_hyperplane`` of the norm in which ``moves`` is the cheapest way."""
    at = point.flatten(1)
    weights = weight.flatten(1).to(point.dtype)

    # By the largest weight: the squares of a confident model's gradients would underflow.
    scale = divisor(weights.abs().amax(1, keepdim=True))
    size = weights.abs() / scale
    needed = value.to(at.dtype).abs().unsqueeze(1) / scale

    direction = torch.where(value.unsqueeze(1) > 0, -weights.sign(), weights.sign())
    room = torch.where(direction > 0, bounds[1] - at, at - bounds[0]).clamp(0, FAR)
    return (direction * moves(size, room, needed)).view_as(point)


def all_at_once(size: Tensor, room: Tensor, needed: Tensor, *, speed: Tensor) -> Tensor:
    """Steps min(t · speed, room), with ``speed`` (B, D).

    With pixels in the order in which they meet their faces, Σ size · min(t · speed, room) is the
    least, over k, of what the first k give in full plus t times the rate of the others. So t is the
    largest of the solutions for each k.
    """
    order = (room / divisor(speed)).argsort(dim=1, stable=True)
    full = (size * room).gather(1, order)
    before = full.cumsum(1) - full
    rate = (size * speed).gather(1, order).flip(1).cumsum(1).flip(1)

    t = ((needed - before) / divisor(rate)).amax(1, keepdim=True)
    return (t.clamp_max(torch.finfo(size.dtype).max) * speed).minimum(room)


def one_after_another(size: Tensor, room: Tensor, needed: Tensor) -> Tensor:
    """Steps as long as the room in order of size, the largest first, until they are enough."""
    order = size.argsort(dim=1, descending=True, stable=True)
    sizes = size.gather(1, order)
    rooms = room.gather(1, order)
    full = sizes * rooms
    before = full.cumsum(1) - full

    taken = ((needed - before) / divisor(sizes)).clamp_min(0).minimum(rooms)
    return torch.zeros_like(size).scatter(1, order, taken)
