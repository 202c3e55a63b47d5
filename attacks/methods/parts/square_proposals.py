"""What the Square attack proposes: signs in one window where ball and box are a box, patterns moved
from window to window in L2 and L1 (arXiv 1912.00049, sections 4.1 and 4.2).

All draws depend on the key of the attempt and the number of the proposal alone. So a proposal can
be made before it is known whether the ones before it are accepted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.lengths import divisor
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.methods.parts.square_windows import (
    Plane,
    Window,
    counted,
    covered,
    draw_windows,
    share_of_image,
    two_bumps,
)
from ironmoe.attacks.random import uniform
from ironmoe.kernels.attack_step import column

# So many proposals are drawn for each query, which asks about the first that changes the image.
DRAWS = 8
# If the sum of two windows of length 1 is shorter than this, it is no more than rounding.
CANCELLED = 1e-4
# The starting points of L2 and L1 have so many tiles along each axis.
TILES = 5

# A later proposal depends on these columns.
PROPOSED_FROM = (
    *("best", "clean", "key", "eps", "step", "extent"),
    *("eps_scale", "low_bound", "high_bound"),
)


class Next(NamedTuple):
    """The next proposals of R attempts, K of each, in their order.

    points: (R, K, …)
    steps:  (R, K) int64, proposals made with each, those that change nothing included
    there:  (R, K) bool, whether there is such a proposal; those that there are come first
    """

    points: Tensor
    steps: Tensor
    there: Tensor


class Proposals(Protocol):
    """Where an attempt starts, and which changes it proposes, from its best point ``best`` and the
    number ``step`` of proposals that it has made."""

    steps: int
    """The number of the last one."""

    def start(self, attempts: Attempts) -> Tensor:
        """(R, …) the starting points. What the proposals need is added to the attempts."""

    def one(self, attempts: Attempts) -> Next:
        """The next proposal of each attempt, K = 1. For an attempt that has none left, ``there`` is
        False, ``steps`` is the number of its last proposal, and ``points`` is of no use."""

    def several(self, attempts: Attempts, count: int) -> Next:
        """The ``count`` proposals after ``point``, if that is not accepted."""


class SignProposals:
    """Every pixel is as low or as high as the box allows that ball and image box form together;
    each channel of a window is set to one of the two (section 4.1).

    A proposal that is the image itself is passed over: it counts as a step and is not asked about.

    Args:
        steps: proposals of an attempt.
        p_init: share of the image that the first windows cover.
    """

    def __init__(self, steps: int, p_init: float) -> None:
        self.steps = steps
        self.p_init = p_init

    def start(self, attempts: Attempts) -> Tensor:
        """Each column of each channel is low or high."""
        high = planes_of(attempts["high"])
        shape = (high.shape[1], 1, high.shape[3])
        upwards = uniform(attempts["key"], shape, torch.float32) < 0.5
        low = planes_of(attempts["low"])
        return torch.where(upwards, high, low).view_as(attempts["clean"])

    def one(self, attempts: Attempts) -> Next:
        """The first of the next ``DRAWS`` proposals that changes the image. If none of them does,
        and there are more to come, it is the last of these."""
        found, all_seen = self._useful(attempts, 1, DRAWS)
        return found._replace(there=found.there | ~all_seen.unsqueeze(1))

    def several(self, attempts: Attempts, count: int) -> Next:
        return self._useful(attempts, count, 2 * count + DRAWS)[0]

    def _useful(self, attempts: Attempts, count: int, draws: int) -> tuple[Next, Tensor]:
        """Of the next proposals, as many as there are ``draws``, the first ``count`` that change
        the image (where there are fewer, the last of all in their place); and (R,) bool, whether
        there are no proposals after these draws."""
        high, low, best = (planes_of(attempts[name]) for name in ("high", "low", "best"))
        plane = plane_of(best)
        channels = best.shape[1]

        step = attempts["step"].unsqueeze(1) + torch.arange(draws, device=best.device)
        keys = attempts["key"].unsqueeze(1) + 1 + step
        numbers = uniform(keys.flatten(), (2 + channels,), torch.float32)
        numbers = numbers.view(*step.shape, 2 + channels)
        share = share_of_image(step, self.p_init)
        extent = attempts.get("extent")
        windows = draw_windows(numbers[..., :2], share, plane, odd=False, extent=extent)
        upwards = numbers[..., 2:] < 0.5

        # A window changes nothing where every channel has the sign already.
        area = (windows.height * windows.width).unsqueeze(2)
        is_high = counted(best == high, windows)
        if extent is None:
            idle = (is_high == torch.where(upwards, area, 0)).all(2)
        else:  # an element that may not move is as low as it is high
            is_low = counted(best == low, windows)
            idle = (torch.where(upwards, is_high, is_low) == area).all(2)
        useful = ~idle & (step < self.steps)
        chosen = (~useful).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        found = useful.gather(1, chosen)
        chosen = torch.where(found, chosen, draws - 1)

        window = Window(*(field.gather(1, chosen) for field in windows))
        upward = upwards.gather(1, chosen.unsqueeze(2).expand(-1, -1, channels))[..., None, None]
        new = torch.where(upward, high.unsqueeze(1), low.unsqueeze(1))
        points = torch.where(covered(window, plane).unsqueeze(2), new, best.unsqueeze(1))
        points = points.view(len(best), count, *attempts["best"].shape[1:])
        steps = step.gather(1, chosen) + 1
        return Next(points, steps, found), step[:, -1] + 1 >= self.steps


class BumpProposals:
    """Of two windows one is emptied, and the other gets the pattern of ``two_bumps`` and the norm
    of both (section 4.2, algorithm 3).

    In L2 the whole is then scaled to norm eps and clipped to the box. In a norm with sparse steps
    more than the norm is handed out, and the projection onto ball and box takes it back.

    Args:
        steps: proposals of an attempt.
        p_init: share of the image that the first windows cover.
        ball: gives the ball of some attempts.
        order: of the norm.
        sparse: whether the norm has sparse steps.
    """

    def __init__(
        self,
        steps: int,
        p_init: float,
        *,
        ball: Callable[[Attempts], Ball],
        order: int,
        sparse: bool,
    ) -> None:
        self.steps = steps
        self.p_init = p_init
        self.ball = ball
        self.order = order
        self.sparse = sparse

    def start(self, attempts: Attempts) -> Tensor:
        ball = self.ball(attempts)
        tiles = self._tiles(attempts).view_as(ball.center) * ball.width
        return self._within(ball, planes_of(ball.free_part(tiles)))

    def one(self, attempts: Attempts) -> Next:
        point, made, nothing_left = self._move(attempts)
        return Next(point.unsqueeze(1), made.unsqueeze(1), ~nothing_left.unsqueeze(1))

    def several(self, attempts: Attempts, count: int) -> Next:
        known = {name: attempts[name] for name in PROPOSED_FROM if name in attempts}
        later = repeated(known, count)
        rows = len(attempts["key"])
        later["step"] = later["step"] + torch.arange(count, device=later["step"].device).repeat(
            rows
        )

        points, made, nothing_left = self._move(later)
        shape = (rows, count)
        return Next(
            points.view(*shape, *points.shape[1:]), made.view(shape), ~nothing_left.view(shape)
        )

    def _tiles(self, attempts: Attempts) -> Tensor:
        """(R, C, H, W) the pattern to start from: two bumps in each of 5 × 5 tiles (a few more
        where the image is not a multiple of 5), of any sign in each channel."""
        clean = planes_of(attempts["clean"])
        channels = clean.shape[1]
        plane = plane_of(clean)
        tile = (max(plane[0] // TILES, 1), max(plane[1] // TILES, 1))
        count = (plane[0] // tile[0], plane[1] // tile[1])

        window = (torch.full_like(attempts["key"][:1], n).repeat(2) for n in (0, 0, *tile))
        turned = torch.arange(2, device=clean.device) == 1
        patterns = two_bumps(Window(*window), turned, tile, self.order, clean.dtype)
        upright, lying = patterns.repeat(1, *count)

        draws = uniform(attempts["key"], (channels + 1, *count), torch.float32) < 0.5
        draws = draws.repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)
        bumps = torch.where(draws[:, -1:], lying, upright)
        bumps = torch.where(draws[:, :-1], -bumps, bumps)

        # The tiles lie in the middle; around them is what is left of the image.
        up = (plane[0] - tile[0] * count[0]) // 2
        left = (plane[1] - tile[1] * count[1]) // 2
        down = plane[0] - up - bumps.shape[2]
        right = plane[1] - left - bumps.shape[3]
        return torch.nn.functional.pad(bumps, (left, right, up, down))

    def _move(self, attempts: Attempts) -> tuple[Tensor, Tensor, Tensor]:
        """(R, …) the next proposal, (R,) steps made with it, (R,) bool whether no step was left."""
        ball = self.ball(attempts)
        delta = planes_of(ball.in_units(attempts["best"] - attempts["clean"]))
        plane = plane_of(delta)
        channels = delta.shape[1]
        order = self.order

        draws = uniform(attempts["key"] + 1 + attempts["step"], (5 + channels,), torch.float32)
        share = share_of_image(attempts["step"], self.p_init).unsqueeze(1)
        extent = attempts.get("extent")
        places = draws[:, :4].view(-1, 2, 2)
        windows = draw_windows(places, share, plane, odd=True, extent=extent)
        inside, emptied = covered(windows, plane).unsqueeze(2).unbind(1)
        either = inside | emptied

        filled = Window(*(field[:, 0] for field in windows))
        pattern = two_bumps(filled, draws[:, 4] < 0.5, plane, order, delta.dtype).unsqueeze(1)
        pattern = torch.where(draws[:, 5:].view(-1, channels, 1, 1) < 0.5, -pattern, pattern)
        if "extent" in attempts:
            pattern = planes_of(ball.free_part(pattern.reshape(ball.center.shape)))
        old = delta * inside
        new = pattern + old / _length(old, order)

        # The window gets what the two held, and its share of what the norm leaves unspent.
        whole = column(attempts["eps"], delta) ** order
        unspent = (whole - _length(delta, order, (1, 2, 3)) ** order).clamp_min(0)
        spent = _length(delta * either, order) ** order
        length = (unspent / channels + spent) ** (1 / order)
        if self.sparse:
            length = length * channels  # too much: what the projection leaves of it is sparse

        new = torch.where(_length(new, order) > CANCELLED, new, pattern)
        new = new / _length(new, order) * length
        moved = torch.where(inside, new, delta * ~either)
        point = self._within(ball, moved)
        return point, attempts["step"] + 1, attempts["step"] >= self.steps

    def _within(self, ball: Ball, delta: Tensor) -> Tensor:
        """The clean image plus ``delta`` (R, C, H, W) units, in ball and box."""
        if not self.sparse:
            delta = delta / _length(delta, 2, (1, 2, 3)) * column(ball.eps, delta)
        moved = ball.center + ball.in_pixels(delta.view_as(ball.center))
        return ball.pull_in(moved) if self.sparse else ball.clip(moved)


def repeated(attempts: Attempts, count: int) -> Attempts:
    """Each attempt ``count`` times in a row."""
    return {name: value.repeat_interleave(count, 0) for name, value in attempts.items()}


def planes_of(images: Tensor) -> Tensor:
    """(R, …) → (R, C, H, W)."""
    shape = (1, 1, *images.shape[1:])
    return images.reshape(len(images), math.prod(shape[:-2]), *shape[-2:])


def plane_of(planes: Tensor) -> Plane:
    """Height and width of planes (R, C, H, W)."""
    return planes.shape[2], planes.shape[3]


def _length(values: Tensor, order: int, axes: tuple[int, ...] = (2, 3)) -> Tensor:
    """The norm, to divide by: never 0."""
    return divisor(torch.linalg.vector_norm(values, order, axes, keepdim=True))
