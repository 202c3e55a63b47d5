"""The schedule of Auto-PGD in L1, where how many pixels move matters more than how far (Croce &
Hein, arXiv 2103.01208, algorithm 1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.random import normal
from ironmoe.kernels.attack_step import column

# The first steps move this share of the pixels.
FIRST_SHARE = 0.2
# The best point has so many times as many changed pixels as the steps that follow move.
DENSER = 1.5
# Steps get so many times shorter at a check, down to this share of the radius.
SHORTER = 1.5
SHORTEST_STEP = 0.1
# A best point with fewer than this share of the pixels of the last check is progress.
SPARSER = 0.95


class Sparsity:
    """Steps along the signs of the k largest gradients, with a k that follows the best point (arXiv
    2103.01208, Algorithm 1).

    Every 4 % of the steps an example looks at how many pixels of its best point differ from the
    image. k becomes this over 1.5. If it has fallen by more than 5 % since the last check, the
    example goes back to that point and its steps are as long as the radius again; otherwise they
    get 1.5 times shorter, down to a tenth of the radius. Each step is projected exactly onto ball
    and box.

    Two things differ from the official code. k counts pixels that can move: with those at a face of
    the box among them, steps may move nothing while other pixels have room. And k is rounded down:
    rounded up, it never gets below 2.

    With ``three_radii`` the first 30 % of the points lie in the ball of 3 · eps, the next 30 % in
    that of 2 · eps, the others in that of eps; each search begins at the projection of the last
    one's best point. This projection takes the place of a step.

    Args:
        steps: of an attempt.
        ball: gives the ball of some attempts.
        three_radii: see above.
    """

    def __init__(self, steps: int, ball: Callable[[Attempts], Ball], *, three_radii: bool) -> None:
        self.ball = ball
        self.three_radii = three_radii
        early = 3 * steps // 10 if three_radii else 0
        # Answers after which the searches at the two larger radii end.
        self.ends = (early, 2 * early)
        # Steps from one check to the next, in these searches and in the last one.
        self.early_window = max(int(0.04 * early), 1)
        self.window = max(int(0.04 * (steps - 2 * early)), 1)

    def start(self, attempts: Attempts) -> None:
        clean = attempts["clean"]
        attempts["radius"] = self._radius(attempts)
        ball = self.ball(attempts | {"eps": attempts["radius"]})
        noise = normal(attempts["key"], clean.shape[1:], clean.dtype) * ball.width
        attempts["point"] = ball.project(clean + noise)

        attempts |= self._search_from_point(attempts)
        if not self.three_radii:
            size = torch.zeros_like(attempts["pixels"]) + ball.movable
            attempts["moving"] = (FIRST_SHARE * size.double()).long().clamp_min(1)
            attempts["pixels"] = size

    def goes_back(self, attempts: Attempts, loss: Tensor) -> Tensor:
        left = attempts["left"] - 1
        due = left == 0
        pixels = _changed(attempts["peak"], attempts["clean"])
        sparser = pixels < SPARSER * attempts["pixels"]

        shorter = (attempts["alpha"] / SHORTER).maximum(SHORTEST_STEP * attempts["radius"])
        alpha = torch.where(sparser, attempts["radius"], shorter)
        attempts["alpha"] = torch.where(due, alpha, attempts["alpha"])
        attempts["moving"] = torch.where(due, _moving(pixels), attempts["moving"])
        attempts["pixels"] = torch.where(due, pixels, attempts["pixels"])
        attempts["left"] = torch.where(due, self._window(attempts), left)
        return due & sparser

    def move(self, attempts: Attempts, point: Tensor, grad: Tensor) -> None:
        radius = self._radius(attempts)
        begins = radius < attempts["radius"]
        attempts["radius"] = radius

        ball = self.ball(attempts | {"eps": radius})
        direction = _sparse_sign(grad, attempts["moving"], point, ball)
        stepped = point + ball.in_pixels(column(attempts["alpha"], point) * direction)
        attempts["point"] = ball.pull_in(where(begins, attempts["peak"], stepped))

        # A search at another radius knows nothing of the one before but its best point.
        forgotten = {"peak_loss": torch.full_like(attempts["peak_loss"], float("-inf"))}
        for name, value in (self._search_from_point(attempts) | forgotten).items():
            attempts[name] = torch.where(begins, value, attempts[name])

    def _search_from_point(self, attempts: Attempts) -> Attempts:
        """What a search remembers at its beginning, other than its radius."""
        pixels = _changed(attempts["point"], attempts["clean"])
        return {
            "alpha": attempts["radius"],
            "moving": _moving(pixels),
            "pixels": pixels,
            # Answers until the next check; the first one is about the start.
            "left": self._window(attempts) + 1,
        }

    def _radius(self, attempts: Attempts) -> Tensor:
        """(R,) of the ball that the next point lies in."""
        triple = attempts["queries"] < self.ends[0]
        double = attempts["queries"] < self.ends[1]  # at the triple radius, too
        return attempts["eps"] * (1 + triple.long() + double)

    def _window(self, attempts: Attempts) -> Tensor:
        """(R,) int64, steps from one check to the next."""
        early = attempts["radius"] > attempts["eps"]
        return torch.where(early, self.early_window, self.window).to(attempts["key"].dtype)


def _changed(point: Tensor, clean: Tensor) -> Tensor:
    """(R,) int64, how many pixels differ."""
    return (point != clean).flatten(1).sum(1)


def _moving(pixels: Tensor) -> Tensor:
    """(R,) int64, how many pixels the next steps move if ``pixels`` (R,) of the best point
    differ."""
    return (pixels / DENSER).floor().clamp_min(1).long()


def _sparse_sign(grad: Tensor, moving: Tensor, point: Tensor, ball: Ball) -> Tensor:
    """(R, …) the signs of the ``moving`` (R,) largest entries of pixels with room, over their
    number; 0 where the gradient is 0. Entries count as in the ball's units.

    So the part inside the box has an L1 length of 1. Pixels at their face whose entries are as
    large are pushed as far: the projection shortens all pixels alike, and this keeps them there.
    """
    slope = ball.in_pixels(grad).flatten(1)
    size = slope.abs()
    sign = slope.sign()
    low, high = ball.bounds
    below = (point < high).flatten(1)
    has_room = torch.where(sign > 0, below, (point > low).flatten(1)) & (sign != 0)

    ranked = (size * has_room).sort(dim=1, descending=True).values
    pushed = size >= ranked.gather(1, moving.unsqueeze(1) - 1)
    count = (pushed & has_room).sum(1, keepdim=True).clamp_min(1)
    return (sign * pushed / count).view_as(grad)
