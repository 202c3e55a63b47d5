"""The nearest point of a hyperplane inside the image box, in Linf, L2 and L1 (Croce & Hein, arXiv
1907.02044).

A linear function changes the most, for the length of the step, if each pixel moves with or against
the sign of its weight: in Linf all pixels equally fast, in L2 as fast as their weights are large,
in L1 one after another, the largest weight first. A pixel that meets its face of the box stays
there. So there is one number to find, how far the others go.
"""

import torch
from torch import Tensor

from ironmoe.attacks.balls.balls import Bounds

DUAL = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
FAR = 1e30  # room of a pixel without bounds, so that sums stay finite


@torch.no_grad()
def step_to_hyperplane(
    point: Tensor, weight: Tensor, value: Tensor, bounds: Bounds, norm: str
) -> Tensor:
    """The shortest step d from ``point`` to {z: value + ⟨weight, z − point⟩ = 0} with point + d
    inside the box.

    Where the box does not meet the hyperplane, the step to the corner nearest to it: the one at
    which the linear function comes closest to 0. Pixels of weight 0 never move, and nothing waits
    for the device.

    Args:
        point: (B, …) float32 or float64, inside ``bounds``.
        weight: (B, …) gradient of the linear function.
        value: (B,) its value at ``point``.
        bounds: lowest and highest valid pixel; they may be infinite.
        norm: "Linf", "L2" or "L1", in which the step is the shortest.

    Returns:
        (B, …) in the dtype of ``point``.
    """
    at, weights = point.flatten(1), weight.flatten(1).to(point.dtype)
    # By the largest weight: the squares of a confident model's gradients would underflow.
    largest = weights.abs().amax(1, keepdim=True).clamp_min(torch.finfo(at.dtype).tiny)
    size = weights.abs() / largest
    needed = value.to(at.dtype).abs().unsqueeze(1) / largest
    direction = torch.where(value.unsqueeze(1) > 0, -weights.sign(), weights.sign())
    room = torch.where(direction > 0, bounds[1] - at, at - bounds[0]).clamp(0, FAR)
    if norm == "L1":
        taken = _one_after_another(size, room, needed)
    else:
        taken = _all_at_once(size, size if norm == "L2" else torch.ones_like(size), room, needed)
    return (direction * taken).view_as(point)


def length(step: Tensor, norm: str) -> Tensor:
    """(B,) the norm of each row of ``step`` (B, …), in its dtype."""
    flat = step.flatten(1)
    if norm == "Linf":
        return flat.abs().amax(1)
    if norm == "L1":
        return flat.abs().sum(1)
    largest = flat.abs().amax(1)  # squares would underflow, or overflow
    unit = flat / largest.clamp_min(torch.finfo(flat.dtype).tiny).unsqueeze(1)
    return unit.norm(dim=1) * largest


def _all_at_once(size: Tensor, speed: Tensor, room: Tensor, needed: Tensor) -> Tensor:
    """(B, D) steps min(t · speed, room) with Σ size · step = needed (B, 1); all of the room where
    that is too little.

    With pixels in the order in which they meet their faces, Σ size · min(t · speed, room) is the
    least, over k, of what the first k give in full plus t times the rate of the others. So t is the
    largest of the solutions for each k.
    """
    order = (room / speed.clamp_min(torch.finfo(size.dtype).tiny)).argsort(dim=1, stable=True)
    full = (size * room).gather(1, order)
    before = full.cumsum(1) - full
    rate = (size * speed).gather(1, order).flip(1).cumsum(1).flip(1)
    t = ((needed - before) / rate.clamp_min(torch.finfo(size.dtype).tiny)).amax(1, keepdim=True)
    return (t.clamp_max(torch.finfo(size.dtype).max) * speed).minimum(room)


def _one_after_another(size: Tensor, room: Tensor, needed: Tensor) -> Tensor:
    """(B, D) steps with Σ size · step = needed (B, 1): all of the room in order of size until it is
    enough."""
    order = size.argsort(dim=1, descending=True, stable=True)
    sizes, rooms = size.gather(1, order), room.gather(1, order)
    full = sizes * rooms
    before = full.cumsum(1) - full
    taken = (
        ((needed - before) / sizes.clamp_min(torch.finfo(size.dtype).tiny))
        .clamp_min(0)
        .minimum(rooms)
    )
    return torch.zeros_like(size).scatter(1, order, taken)
