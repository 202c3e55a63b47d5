"""The Square attack: random search that needs logits only."""

import math
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.balls import Bounds
from ironmoe.attacks.engine.attacked_model import Answer, Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.losses import margin
from ironmoe.attacks.methods.square_windows import (
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

DRAWS = 8  # proposals looked at for each question
# a smaller batch costs hardly less a step: later proposals fill it up
ROWS_AT_LEAST = {"cpu": 128, "cuda": 128}
# questions about one image at a time, at most: what follows an accepted proposal was asked in vain
AHEAD = 16
CANCELLED = 1e-4  # a sum of two windows of length 1 that is shorter is rounding
TILES = 5  # along each axis in the starting points of L2 and L1


class Square(FixedRadiusAttack):
    """Random search in square windows (Andriushchenko et al., arXiv 1912.00049; L1: Croce & Hein,
    arXiv 2103.01208). No gradients.

    Each step proposes to change one window of the image and keeps the change if the margin grows,
    the best wrong logit minus the right one. The windows shrink from ``p_init`` of the image by
    halves, after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 proposals, however many
    ``steps`` there are.

    - Linf: every pixel is as low or as high as ball and box allow, at first in vertical stripes;
      each channel of the window is set to one of the two.
    - L2: of two windows one is emptied, and the other gets the pattern of ``two_bumps`` and the
      norm of both; then the whole is scaled to norm eps and clipped to the box. It starts with such
      patterns in tiles.
    - L1: as L2, but more than the norm is handed out, and the projection onto ball and box takes it
      back.

    The official code draws one window for the whole batch; here each image draws its own, from its
    key and the number of the step.
    In Linf a proposal often is the image itself: for one channel and windows of one pixel half of
    the time. Its answer is known, so it counts as a step but is not asked for, and the search is
    the same with fewer passes. In a batch of few images the next proposals are asked about along
    with the present one, for what happens if it is not accepted: the search is the same in fewer
    rounds.

    Images (C, H, W); more leading axes count as channels, none as one channel, and a vector is an
    image of height 1. If it fails, the result is the point of the highest margin.

    Args (beyond those of ``Attack``):
        steps: proposals after the starting point, ≥ 0.
        p_init: share of the image that the first windows cover, in (0, 1].
        restarts: runs from different starts, ≥ 1.
    """

    norms: tuple[str, ...] = ("Linf", "L2", "L1")
    gradient = False
    takes_groups = False
    needs_a_box = True

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        steps: int = 5000,
        p_init: float = 0.8,
        restarts: int = 1,
        norm: str = "Linf",
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, norm=norm, bounds=bounds, seed=seed, **options)
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init must be above 0 and at most 1, got {p_init}")
        if restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {restarts}")
        self.steps, self.p_init, self.restarts = steps, p_init, restarts
        self.max_queries = steps + 1
        self._order = {"Linf": 0, "L2": 2, "L1": 1}[norm]

    def __repr__(self) -> str:
        return (
            f"Square({self.norm}, eps={self.eps}, steps={self.steps}, "
            f"restarts={self.restarts}, seed={self.seed})"
        )

    def start(self, attempts: Attempts) -> None:
        if self.norm == "Linf":
            attempts |= self.ball(attempts).edges()
            point = self._stripes(attempts)
        else:
            point = self._within(attempts, self._tiles(attempts))
        attempts["point"] = attempts["best"] = point
        attempts["best_margin"] = torch.full_like(attempts["eps"], -math.inf)
        attempts["step"] = torch.zeros_like(
            attempts["label"]
        )  # proposals made, those not asked for too
        attempts["finished"] = (attempts["eps"] == 0) | (self.steps == 0)

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        return margin(logits, attempts["label"])

    def passes_per_query(self, count: int, device: str) -> int:
        return self.eot * self._points(count, device)

    def ask(self, attempts: Attempts, want_grad: bool) -> Answer:
        """In a small batch, about ``point`` and about the proposals that come after it if it is not
        accepted, as most are not: the first that is accepted is the one that would have been
        reached step by step."""
        count = self._points(len(attempts["label"]), attempts["label"].device.type)
        if count == 1:
            return super().ask(attempts, want_grad)
        points, steps, there = self._ahead(attempts, count - 1)
        points = torch.cat([attempts["point"].unsqueeze(1), points], 1)
        steps = torch.cat([attempts["step"].unsqueeze(1), steps], 1)
        there = torch.cat(
            [torch.ones_like(there[:, :1]), there & ~attempts["finished"].unsqueeze(1)], 1
        )
        answer = super().ask(
            _repeated(attempts, count) | {"point": points.flatten(0, 1)}, want_grad
        )
        loss = answer.loss.view(-1, count)
        accepted = (loss > attempts["best_margin"].unsqueeze(1)) & there
        last = there.sum(1) - 1  # what there is comes first
        place = torch.where(accepted.any(1), accepted.to(torch.int8).argmax(1), last)
        row = torch.arange(len(place), device=place.device)
        attempts["point"], attempts["step"] = points[row, place], steps[row, place]
        return Answer(
            answer.logits.view(-1, count, answer.logits.shape[1])[row, place],
            loss[row, place],
            None,
            self.eot * count,
            place + 1,
        )

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        grown = loss > attempts["best_margin"]
        attempts["best_margin"] = torch.where(grown, loss.double(), attempts["best_margin"])
        attempts["best"] = where(grown, attempts["point"], attempts["best"])
        proposal, step, nothing_left = (
            self._change_signs(attempts) if self.norm == "Linf" else self._move_bumps(attempts)
        )
        attempts["finished"] = attempts["finished"] | nothing_left
        attempts["point"] = where(attempts["finished"], attempts["best"], proposal)
        attempts["step"] = step

    def _points(self, count: int, device: str) -> int:
        """That a question is about, for each of so many rows."""
        return min(max(1, ROWS_AT_LEAST.get(device, 1) // count), AHEAD)

    def _stripes(self, attempts: Attempts) -> Tensor:
        """Each column of each channel low or high: the starting point of section 4.1."""
        high = _planes(attempts["high"])
        sign = uniform(attempts["key"], (high.shape[1], 1, high.shape[3]), torch.float32) < 0.5
        return torch.where(sign, high, _planes(attempts["low"])).view_as(attempts["clean"])

    def _change_signs(self, attempts: Attempts) -> tuple[Tensor, Tensor, Tensor]:
        """(the first of the next ``DRAWS`` proposals that changes the image, steps made with it,
        (R,) bool: no step is left to make).

        If none of them changes anything, and there are more to come, the last."""
        proposals, made, useful, all_seen = self._useful_signs(attempts, 1, DRAWS)
        return proposals[:, 0], made[:, 0], ~useful[:, 0] & all_seen

    def _useful_signs(
        self, attempts: Attempts, count: int, draws: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the next proposals, as many as there are ``draws``, the first ``count`` that change
        the image: (R, count, …), steps made with each, (R, count) bool whether there is one (else
        the last of all), (R,) bool whether they were the last ones."""
        high, low, best = (_planes(attempts[name]) for name in ("high", "low", "best"))
        plane, channels = _plane(best), best.shape[1]
        step = attempts["step"].unsqueeze(1) + torch.arange(draws, device=best.device)
        keys = attempts["key"].unsqueeze(1) + 1 + step
        numbers = uniform(keys.flatten(), (2 + channels,), torch.float32).view(
            *step.shape, 2 + channels
        )
        windows = draw_windows(
            numbers[..., :2], share_of_image(step, self.p_init), plane, odd=False
        )
        upwards = numbers[..., 2:] < 0.5
        area = (windows.height * windows.width).unsqueeze(2)
        idle = (counted(best == high, windows) == torch.where(upwards, area, 0)).all(2)
        useful = ~idle & (step < self.steps)
        chosen = (~useful).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        found = useful.gather(1, chosen)
        chosen = torch.where(found, chosen, draws - 1)
        window = Window(*(field.gather(1, chosen) for field in windows))
        upward = upwards.gather(1, chosen.unsqueeze(2).expand(-1, -1, channels))[..., None, None]
        new = torch.where(upward, high.unsqueeze(1), low.unsqueeze(1))
        proposals = torch.where(covered(window, plane).unsqueeze(2), new, best.unsqueeze(1))
        shape = (len(best), count, *attempts["best"].shape[1:])
        return (
            proposals.view(shape),
            step.gather(1, chosen) + 1,
            found,
            step[:, -1] + 1 >= self.steps,
        )

    def _ahead(self, attempts: Attempts, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``count`` proposals after ``point`` if that is not accepted: (R, count, …), steps
        made with each, whether there is one."""
        if self.norm == "Linf":
            return self._useful_signs(attempts, count, 2 * count + DRAWS)[:3]
        later = _repeated(
            {name: attempts[name] for name in ("best", "clean", "key", "eps", "step")}, count
        )
        later["step"] = later["step"] + torch.arange(count, device=later["step"].device).repeat(
            len(attempts["label"])
        )
        proposals, made, nothing_left = self._move_bumps(later)
        shape = (-1, count)
        return (
            proposals.view(*attempts["label"].shape, count, *proposals.shape[1:]),
            made.view(shape),
            ~nothing_left.view(shape),
        )

    def _tiles(self, attempts: Attempts) -> Tensor:
        """(R, C, H, W) the perturbation to start from: two bumps in each of 5 × 5 tiles (a few more
        where the image is not a multiple of 5), of any sign in each channel."""
        clean = _planes(attempts["clean"])
        channels, plane = clean.shape[1], _plane(clean)
        tile = (max(plane[0] // TILES, 1), max(plane[1] // TILES, 1))
        count = (plane[0] // tile[0], plane[1] // tile[1])
        whole = Window(
            *(torch.full_like(attempts["label"][:1], value).repeat(2) for value in (0, 0, *tile))
        )
        turned = torch.arange(2, device=clean.device) == 1
        upright, lying = two_bumps(whole, turned, tile, self._order, clean.dtype).repeat(1, *count)
        draws = uniform(attempts["key"], (channels + 1, *count), torch.float32) < 0.5
        draws = draws.repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)
        bumps = torch.where(draws[:, -1:], lying, upright)
        bumps = torch.where(draws[:, :-1], -bumps, bumps)
        up, left = (
            (size - of * many) // 2 for size, of, many in zip(plane, tile, count, strict=True)
        )
        down, right = plane[0] - up - bumps.shape[2], plane[1] - left - bumps.shape[3]
        return torch.nn.functional.pad(bumps, (left, right, up, down)) * (
            self.bounds[1] - self.bounds[0]
        )

    def _move_bumps(self, attempts: Attempts) -> tuple[Tensor, Tensor, Tensor]:
        """(the proposal, steps made with it, (R,) bool: no step was left to make): section 4.2,
        algorithm 3."""
        delta = _planes(attempts["best"] - attempts["clean"])
        plane, channels, order = _plane(delta), delta.shape[1], self._order
        draws = uniform(attempts["key"] + 1 + attempts["step"], (5 + channels,), torch.float32)
        share = share_of_image(attempts["step"], self.p_init).unsqueeze(1)
        windows = draw_windows(draws[:, :4].view(-1, 2, 2), share, plane, odd=True)
        inside, emptied = covered(windows, plane).unsqueeze(2).unbind(1)
        either = inside | emptied
        filled = Window(*(field[:, 0] for field in windows))
        pattern = two_bumps(filled, draws[:, 4] < 0.5, plane, order, delta.dtype).unsqueeze(1)
        pattern = torch.where(draws[:, 5:].view(-1, channels, 1, 1) < 0.5, -pattern, pattern)
        old = delta * inside
        new = pattern + old / _length(old, order)
        unspent = (
            column(attempts["eps"], delta) ** order - _length(delta, order, (1, 2, 3)) ** order
        ).clamp_min(0)
        spent = _length(delta * either, order) ** order
        length = (unspent / channels + spent) ** (1 / order)
        if self.norm == "L1":
            length = length * channels  # too much: what the projection leaves of it is sparse
        new = torch.where(_length(new, order) > CANCELLED, new, pattern)
        new = new / _length(new, order) * length
        moved = torch.where(inside, new, delta * ~either)
        return self._within(attempts, moved), attempts["step"] + 1, attempts["step"] >= self.steps

    def _within(self, attempts: Attempts, delta: Tensor) -> Tensor:
        """The clean image plus ``delta`` (R, C, H, W), in ball and box."""
        if self.norm == "L1":
            return self.ball(attempts).project(attempts["clean"] + delta.view_as(attempts["clean"]))
        scaled = delta / _length(delta, 2, (1, 2, 3)) * column(attempts["eps"], delta)
        return (attempts["clean"] + scaled.view_as(attempts["clean"])).clamp(*self.bounds)


def _repeated(attempts: Attempts, count: int) -> Attempts:
    return {name: value.repeat_interleave(count, 0) for name, value in attempts.items()}


def _planes(images: Tensor) -> Tensor:
    """(R, …) → (R, C, H, W)."""
    shape = (1, 1, *images.shape[1:])
    return images.reshape(len(images), math.prod(shape[:-2]), *shape[-2:])


def _plane(planes: Tensor) -> Plane:
    return planes.shape[2], planes.shape[3]


def _length(values: Tensor, order: int, axes: tuple[int, ...] = (2, 3)) -> Tensor:
    """The norm, to divide by: never 0."""
    return torch.linalg.vector_norm(values, order, axes, keepdim=True).clamp_min(
        torch.finfo(values.dtype).tiny
    )
