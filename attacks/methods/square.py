"""Square: a random search in square windows that needs logits only (Andriushchenko et al., arXiv
1912.00049, algorithm 1)."""

import math
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls.abilities import BoxBall, PowerBall, SparseBall
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Answer, Model
from ironmoe.attacks.engine.attempts import Attempts, where
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.methods.parts.square_proposals import (
    BumpProposals,
    Proposals,
    SignProposals,
    planes_of,
    repeated,
)
from ironmoe.attacks.methods.parts.square_windows import extent_of
from ironmoe.attacks.registry import register_attack

# Later proposals fill a batch up to so many rows, since a smaller one takes hardly less time.
ROWS_AT_LEAST = {"cpu": 128, "cuda": 128}
# An attempt asks about at most so many proposals at a time, since later proposals are wasted once
# one is accepted.
AHEAD = 16


@register_attack(
    summary="Random search in square windows, without gradients.",
    source="1912.00049, 2103.01208",
    takes=("steps", "restarts"),
    names={"square": {}},
)
class Square(FixedRadiusAttack):
    """Random search in square windows, without gradients (Andriushchenko et al., arXiv 1912.00049;
    L1: Croce & Hein, arXiv 2103.01208).

    Each step proposes to change one window of the image. It keeps the change if the margin grows,
    which is the best wrong logit minus the right one. The windows shrink from ``p_init`` of the
    image by halves, after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 proposals, however many
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
    with the present one, in case it is not accepted: the search is the same in fewer rounds.

    Images have the shape (C, H, W). More leading axes count as channels, none as one channel, and a
    vector is an image of height 1. Where some elements may not move, windows lie in the smallest
    rectangle around the others, and shares are shares of it. If the attack fails, the result is the
    point of the highest margin.

    Args (beyond those of ``Attack``):
        steps: proposals after the starting point, ≥ 0.
        p_init: share of the image that the first windows cover, in (0, 1].
        restarts: runs from different starts, ≥ 1.
    """

    needs = (BoxBall, PowerBall)
    gradient = False
    takes_groups = False
    needs_a_box = True

    aliases = declare(
        n_queries="steps",
        loss=Only(("margin",), "it raises the margin, or that of its goal"),
        resc_schedule=Only(
            (False,), "windows shrink after fixed numbers of proposals, as in AutoAttack"
        ),
    )

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
        check_counts(0, steps=steps)
        check_counts(1, restarts=restarts)
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init must be above 0 and at most 1, got {p_init}")

        self.steps = steps
        self.p_init = p_init
        self.restarts = restarts
        self.max_queries = steps + 1

        ball = ball_of(norm)
        self._raised = self.goal.loss_named("margin" if "margin" in self.goal.losses else None)
        self._proposals: Proposals
        if issubclass(ball, PowerBall):
            sparse = issubclass(ball, SparseBall)
            self._proposals = BumpProposals(
                steps, p_init, ball=self.ball, order=ball.order, sparse=sparse
            )
        else:
            self._proposals = SignProposals(steps, p_init)

    def __repr__(self) -> str:
        return (
            f"Square({self.norm}, eps={self.eps_text}, steps={self.steps}, "
            f"restarts={self.restarts}, seed={self.seed})"
        )

    def start(self, attempts: Attempts) -> None:
        ball = self.ball(attempts)
        if isinstance(ball, BoxBall):
            attempts |= {"low": ball.low, "high": ball.high}
        if ball.free is not None:
            attempts["extent"] = extent_of(planes_of(ball.free))
        point = self._proposals.start(attempts)
        attempts["point"] = point
        attempts["best"] = point
        attempts["best_margin"] = torch.full_like(attempts["eps"], -math.inf)
        # How many proposals were made, including those that no query was about.
        attempts["step"] = torch.zeros_like(attempts["key"])
        attempts["finished"] = (attempts["eps"] == 0) | (self.steps == 0)

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        return self.signed(self._raised(logits, attempts["label"]))

    def passes_per_query(self, count: int, device: str) -> int:
        return self.eot * self._points(count, device)

    def queries_left(self, attempts: Attempts) -> Tensor:
        """The next query, and one for each later proposal: those that none was about are over."""
        return torch.where(attempts["finished"], 0, self.max_queries - attempts["step"])

    def ask(self, attempts: Attempts, want_grad: bool) -> Answer:
        """In a small batch it asks about ``point``, and about the proposals that come next if
        ``point`` is not accepted, as most are not. The first one that is accepted is the one that a
        search step by step would have reached."""
        count = self._points(len(attempts["key"]), attempts["key"].device.type)
        if count == 1:
            return super().ask(attempts, want_grad)

        later = self._proposals.several(attempts, count - 1)
        points = torch.cat([attempts["point"].unsqueeze(1), later.points], 1)
        steps = torch.cat([attempts["step"].unsqueeze(1), later.steps], 1)
        going_on = later.there & ~attempts["finished"].unsqueeze(1)
        there = torch.cat([torch.ones_like(going_on[:, :1]), going_on], 1)

        asked = repeated(attempts, count) | {"point": points.flatten(0, 1)}
        answer = super().ask(asked, want_grad)

        loss = answer.loss.view(-1, count)
        accepted = (loss > attempts["best_margin"].unsqueeze(1)) & there
        last = there.sum(1) - 1  # the proposals that there are come first
        place = torch.where(accepted.any(1), accepted.to(torch.int8).argmax(1), last)
        row = torch.arange(len(place), device=place.device)
        attempts["point"] = points[row, place]
        attempts["step"] = steps[row, place]
        return Answer(
            logits=answer.logits.view(-1, count, *answer.logits.shape[1:])[row, place],
            loss=loss[row, place],
            grad=None,
            asked=self.eot * count,
            used=place + 1,
        )

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        grown = loss > attempts["best_margin"]
        attempts["best_margin"] = torch.where(grown, loss.double(), attempts["best_margin"])
        attempts["best"] = where(grown, attempts["point"], attempts["best"])

        proposal = self._proposals.one(attempts)
        attempts["finished"] = attempts["finished"] | ~proposal.there[:, 0]
        attempts["point"] = where(attempts["finished"], attempts["best"], proposal.points[:, 0])
        attempts["step"] = proposal.steps[:, 0]

    def _points(self, count: int, device: str) -> int:
        """How many points one query is about, for each of ``count`` attempts."""
        return min(max(1, ROWS_AT_LEAST.get(device, 1) // count), AHEAD)
