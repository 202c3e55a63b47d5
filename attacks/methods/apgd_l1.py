"""The schedule of Auto-PGD in L1, where how many pixels move matters more than how far (Croce &
Hein, arXiv 2103.01208)."""

import torch
from torch import Tensor

from ironmoe.attacks.balls.balls import Bounds
from ironmoe.attacks.balls.l1 import L1Ball
from ironmoe.attacks.engine.attempts import Rows, where
from ironmoe.attacks.random import normal
from ironmoe.kernels.attack_step import column

FIRST_SHARE = 0.2  # of the pixels in the first steps
DENSER = 1.5  # the best point has so many times the pixels of the steps that follow
SHORTER = 1.5  # steps get so many times shorter at a check
SHORTEST = 0.1  # step, in radii
SPARSER = 0.95  # of the pixels of the last check: fewer are progress


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
        bounds: of the box.
        three_radii: see above.
    """

    def __init__(self, steps: int, bounds: Bounds, three_radii: bool) -> None:
        self.bounds = bounds
        early = 3 * steps // 10 if three_radii else 0
        # of the larger radii, in answers
        self.three_radii, self.ends = three_radii, (early, 2 * early)
        self.early_window, self.window = (
            max(int(0.04 * part), 1) for part in (early, steps - 2 * early)
        )

    def start(self, rows: Rows) -> None:
        clean = rows["clean"]
        rows["radius"] = self._radius(rows)
        noise = normal(rows["key"], clean.shape[1:], clean.dtype) * (
            self.bounds[1] - self.bounds[0]
        )
        rows["point"] = L1Ball(clean, rows["radius"], self.bounds).project(clean + noise)
        rows |= self._search_from_point(rows)
        if not self.three_radii:
            size = clean[0].numel()
            rows["moving"] = torch.full_like(rows["moving"], max(1, int(FIRST_SHARE * size)))
            rows["pixels"] = torch.full_like(rows["pixels"], size)

    def goes_back(self, rows: Rows, loss: Tensor) -> Tensor:
        left = rows["left"] - 1
        due, pixels = left == 0, _changed(rows["peak"], rows["clean"])
        sparser = pixels < SPARSER * rows["pixels"]
        shorter = (rows["alpha"] / SHORTER).maximum(SHORTEST * rows["radius"])
        rows["alpha"] = torch.where(
            due, torch.where(sparser, rows["radius"], shorter), rows["alpha"]
        )
        rows["moving"] = torch.where(due, _moving(pixels), rows["moving"])
        rows["pixels"] = torch.where(due, pixels, rows["pixels"])
        rows["left"] = torch.where(due, self._window(rows), left)
        return due & sparser

    def move(self, rows: Rows, point: Tensor, grad: Tensor) -> None:
        radius = self._radius(rows)
        begins = radius < rows["radius"]
        rows["radius"] = radius
        stepped = point + column(rows["alpha"], point) * _sparse_sign(
            grad, rows["moving"], point, self.bounds
        )
        rows["point"] = L1Ball(rows["clean"], radius, self.bounds).project(
            where(begins, rows["peak"], stepped)
        )
        forgotten = {"peak_loss": torch.full_like(rows["peak_loss"], float("-inf"))}
        for name, value in (self._search_from_point(rows) | forgotten).items():
            rows[name] = torch.where(begins, value, rows[name])

    def _search_from_point(self, rows: Rows) -> Rows:
        """What a search remembers at its beginning, other than its radius."""
        pixels = _changed(rows["point"], rows["clean"])
        # answers until the next check; the first one is about the start
        left = self._window(rows) + 1
        return {"alpha": rows["radius"], "moving": _moving(pixels), "pixels": pixels, "left": left}

    def _radius(self, rows: Rows) -> Tensor:
        """(R,) of the ball the next point lies in."""
        return rows["eps"] * (
            1 + (rows["queries"] < self.ends[0]).long() + (rows["queries"] < self.ends[1])
        )

    def _window(self, rows: Rows) -> Tensor:
        """(R,) int64, steps from one check to the next."""
        return torch.where(rows["radius"] > rows["eps"], self.early_window, self.window).to(
            rows["label"].dtype
        )


def _changed(point: Tensor, clean: Tensor) -> Tensor:
    """(R,) int64, how many pixels differ."""
    return (point != clean).flatten(1).sum(1)


def _moving(pixels: Tensor) -> Tensor:
    """(R,) int64, how many pixels the next steps move if ``pixels`` (R,) of the best point
    differ."""
    return (pixels / DENSER).floor().clamp_min(1).long()


def _sparse_sign(grad: Tensor, moving: Tensor, point: Tensor, bounds: Bounds) -> Tensor:
    """(R, …) the signs of the ``moving`` (R,) largest entries of pixels with room, over their
    number; 0 where the gradient is 0.

    So the part inside the box has an L1 length of 1. Pixels at their face whose entries are as
    large are pushed as far: the projection shortens all pixels alike, and this keeps them there.
    """
    size, sign, at = grad.flatten(1).abs(), grad.flatten(1).sign(), point.flatten(1)
    has_room = torch.where(sign > 0, at < bounds[1], at > bounds[0]) & (sign != 0)
    least = (size * has_room).sort(dim=1, descending=True).values.gather(1, moving.unsqueeze(1) - 1)
    pushed = size >= least
    return (sign * pushed / (pushed & has_room).sum(1, keepdim=True).clamp_min(1)).view_as(grad)
