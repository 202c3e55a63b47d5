"""HopSkipJump: it goes along the decision boundary by labels alone (Chen, Jordan & Wainwright,
arXiv 1904.02144, algorithm 2)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, Turned, declare
from ironmoe.attacks.attack import LeastDistanceAttack
from ironmoe.attacks.balls.abilities import HyperplaneBall, StraightBall
from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.checked import bounds_text
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Answer, Model
from ironmoe.attacks.engine.attempts import Attempts, select, where
from ironmoe.attacks.goals.goal import described
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.methods.parts.hopskipjump_phases import Phases
from ironmoe.attacks.methods.parts.hopskipjump_points import PLACES, PROBE, Points, sizes_vary
from ironmoe.attacks.registry import register_attack

# One call of the model is about so many points, since fewer take hardly less time.
ROWS_AT_LEAST = 128


class Chosen(NamedTuple):
    """The point of each query that the search goes on from: the nearest probe that was
    misclassified, or the first misclassified point of another phase; any point if there is none.

    fools: (R,) bool, it is misclassified
    rank: (R,) float64, the lower the better; inf if it is not misclassified
    place: (R,) int64, its place in the query
    point: (R, …)
    logits: (R, C)
    """

    fools: Tensor
    rank: Tensor
    place: Tensor
    point: Tensor
    logits: Tensor


def _count_of(max_num_evals: float) -> int:
    """A number that the authors' code has as a float."""
    if isinstance(max_num_evals, float) and max_num_evals == int(max_num_evals):
        return int(max_num_evals)
    check_counts(1, max_num_evals=max_num_evals)
    return int(max_num_evals)


def _norm_of(constraint: str) -> str:
    """The name of a norm here, of its name in the authors' code."""
    names = {"l2": "L2", "linf": "Linf"}
    if constraint not in names:
        raise ValueError(f"constraint must be one of {tuple(names)}, got {constraint!r}")
    return names[constraint]


@register_attack(
    summary="Goes along the decision boundary by labels alone.",
    source="1904.02144",
    takes=("steps", "restarts"),
    names={"hopskipjump": {}},
)
class HopSkipJump(LeastDistanceAttack):
    """Looks for the nearest misclassified point by nothing but labels (Chen, Jordan & Wainwright,
    arXiv 1904.02144).

    It starts at a random image that is misclassified. Each iteration goes from there to the
    decision boundary by a binary search, asks about probes around the boundary point to learn which
    way leads across, and makes a step that way. Probes are drawn and scaled as in the authors'
    code.

    An image for which no start is found holds, at distance 0. Where the nearest misclassified point
    lies beyond eps, it is projected onto the ball and predicted once more.

    Iteration t asks about initial_probes · √t probes, and about some twenty points more for the
    binary search and the step: 40 iterations are about 18,000 forward passes of each image that
    holds. On a GPU the search and the step cost more passes, since every query is about 25 points
    there.

    Args (beyond those of ``Attack``):
        eps: with ``early_stop`` an image falls at a distance of at most eps; inf goes with
            early_stop=False.
        steps: iterations, ≥ 0; with 0 only the way to the first misclassified image is searched.
        initial_probes: probes of the first iteration, ≥ 1.
        restarts: attempts from other starts, ≥ 1.
        max_probes: of an iteration, ≥ 1.
        start_tries: so many random images are tried as a start, ≥ 1.
        starts: images (M, …) in ``bounds`` that are tried in turn instead of random ones, by each
            attempt from a place of its own. ``targeted=True`` needs them, since random images
            hardly ever are of a given class.
        gamma: above 0. It widens the tolerance of the binary search, γ · d^(−3/2) of the distance
            in L2 and γ / d² in Linf for d pixels (at most 1e-3), and the distance of the probes,
            γ / d of that of the image. Models that round their input may need more than 1.
        early_stop: stop at the first misclassified point within eps; else make all iterations and
            keep the nearest.
    """

    needs = StraightBall
    gradient = False
    needs_a_box = True

    aliases = declare(
        num_iterations="steps",
        init_num_evals="initial_probes",
        max_num_evals=Turned("max_probes", _count_of, 1e4),
        constraint=Turned("norm", _norm_of, "l2"),
        target_label=Only((None,), "give targeted=True, and labels as the classes to reach"),
        target_image=Only((None,), "give starts=, images (M, …) to start from"),
        stepsize_search=Only(
            ("geometric_progression",), "steps are halved until the point is misclassified"
        ),
        clip_min=Only((), "give bounds=(lowest, highest)"),
        clip_max=Only((), "give bounds=(lowest, highest)"),
    )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        steps: int = 40,
        initial_probes: int = 100,
        restarts: int = 1,
        norm: str = "Linf",
        bounds: Bounds = (0.0, 1.0),
        seed: int = 0,
        *,
        max_probes: int = 10_000,
        start_tries: int = 100,
        starts: Tensor | None = None,
        gamma: float = 1.0,
        early_stop: bool = True,
        targeted: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model, eps, norm=norm, bounds=bounds, seed=seed, targeted=targeted, **options
        )
        check_counts(0, steps=steps)
        check_counts(1, initial_probes=initial_probes, restarts=restarts)
        check_counts(1, max_probes=max_probes, start_tries=start_tries)
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be above 0 and finite, got {gamma}")
        if early_stop and bool(torch.as_tensor(eps).isinf().any()):
            raise ValueError(f"eps must be finite where early_stop is True, got {eps}")
        if self.targeted and starts is None:
            raise ValueError(
                "starts must be images for targeted=True, some of them of the target classes, "
                "since random images hardly ever are, got None"
            )
        if starts is not None:
            _check_starts(starts, bounds)

        self.steps = steps
        self.initial_probes = initial_probes
        self.restarts = restarts
        self.max_probes = max_probes
        self.start_tries = start_tries
        self.starts = starts
        self.gamma = gamma
        self.early_stop = early_stop
        self.keeps = "first" if early_stop else "best"
        self.exhaustive = not early_stop

        self._phases = Phases(
            points=Points(norm, gamma, starts, self.levels),
            steps=steps,
            initial_probes=initial_probes,
            max_probes=max_probes,
            start_tries=start_tries if starts is None else len(starts),
        )
        self.max_queries = self._phases.max_queries

    def __repr__(self) -> str:
        return (
            f"HopSkipJump({self.norm}, eps={self.eps_text}, steps={self.steps}, "
            f"restarts={self.restarts}, seed={self.seed})"
        )

    @classmethod
    def takes_ball(cls, ball: type[Ball]) -> bool:
        """Probes lie in the random directions of a HyperplaneBall."""
        return super().takes_ball(ball) and issubclass(ball, HyperplaneBall)

    def start(self, attempts: Attempts) -> None:
        if self.starts is not None:
            shape = attempts["clean"].shape[1:]
            if self.starts.shape[1:] != shape:
                raise ValueError(
                    f"starts must be images of shape {tuple(shape)}, got "
                    f"{tuple(self.starts.shape[1:])}"
                )
            points = self._phases.points
            points = points._replace(starts=self.starts.to(attempts["clean"]))
            self._phases = self._phases._replace(points=points)
        self._phases.begin(attempts)

    def passes_per_query(self, count: int, device: str) -> int:
        return self.eot * PLACES

    def ask(self, attempts: Attempts, want_grad: bool) -> Answer:
        """It asks about several points of each attempt, sums up what the probes say, and answers
        for the point that the search goes on from."""
        rows = len(attempts["key"])
        at_once = min(max(1, ROWS_AT_LEAST // rows), PLACES)
        wanted = self._phases.wanted(attempts)

        chosen: Chosen | None = None
        for first in range(0, PLACES, at_once):
            part = wanted[:, first : first + at_once]
            if not sizes_vary(wanted) or bool(part.any()):
                chosen = self._ask_about(attempts, part, first, chosen)
        assert chosen is not None

        attempts["point"] = chosen.point
        attempts["place"] = chosen.place
        attempts["fools"] = chosen.fools
        asked = wanted if sizes_vary(wanted) else torch.ones_like(wanted)
        return Answer(
            logits=chosen.logits,
            loss=torch.zeros_like(chosen.rank, dtype=chosen.point.dtype),
            grad=None,
            asked=self.eot * asked.sum(1),
        )

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """The nearest misclassified point is the best one, beyond eps, too."""
        distance = self.distance(attempts, attempts["point"])
        return torch.where(attempts["fools"], -distance, -math.inf)

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        self._phases.advance(attempts, self.ball(attempts))

    def _ask_about(
        self, attempts: Attempts, wanted: Tensor, first: int, chosen: Chosen | None
    ) -> Chosen:
        """Ask about the places from ``first`` on, (R, g) bool ``wanted``, and sum up what the
        probes say. What is chosen of these places and of those before."""
        rows, count = wanted.shape
        pair = torch.arange(rows * count, device=wanted.device)
        if sizes_vary(wanted):
            pair = pair[wanted.flatten()]
        asked = select(attempts, pair // count)
        ball = self.ball(asked)
        asked["point"] = self._phases.points.of(asked, ball, first + pair % count)
        answer = super().ask(asked, False)

        values = (
            self.fooled(answer.logits, asked),
            self.goal.bad(answer.logits),
            self.distance(asked, asked["point"]),
            asked["point"],
            answer.logits,
        )
        fools, bad, distance, points, logits = (_in_table(v, pair, rows, count) for v in values)
        fools = fools & wanted
        probing = (attempts["phase"] == PROBE).unsqueeze(1)
        _sum_up(attempts, points, probing=probing & wanted, fools=fools)

        # An answer that is not finite is shown to the engine, which knows what becomes of it.
        place = torch.arange(first, first + count, device=wanted.device).expand(rows, -1)
        rank = torch.where(probing, distance, place).masked_fill(~fools, math.inf)
        rank = rank.masked_fill(bad & wanted, -math.inf)
        best = rank.argmin(1)
        row = torch.arange(rows, device=best.device)
        new = Chosen(*(column[row, best] for column in (fools, rank, place, points, logits)))
        if chosen is None:
            return new
        better = new.rank < chosen.rank
        columns = zip(new, chosen, strict=True)
        return Chosen(*(where(better, now, before) for now, before in columns))


def _in_table(values: Tensor, pair: Tensor, rows: int, count: int) -> Tensor:
    """(R, g, …) the values (n, …) of these pairs of row and place; 0 for others."""
    blank = values.new_zeros(rows * count, *values.shape[1:])
    return blank.index_copy(0, pair, values).view(rows, count, *values.shape[1:])


def _sum_up(attempts: Attempts, points: Tensor, *, probing: Tensor, fools: Tensor) -> None:
    """Add the points (R, g, …) that are probes to the sums. They are added one place after the
    other, so that the sums do not depend on how many are asked about at once."""
    ways = points - attempts["base"].unsqueeze(1)
    ways = torch.where(_beside(probing, ways), ways, 0)
    fooled_ways = torch.where(_beside(fools, ways), ways, 0)
    for place in range(points.shape[1]):
        attempts["probe_sum"] = attempts["probe_sum"] + ways[:, place]
        attempts["fooled_sum"] = attempts["fooled_sum"] + fooled_ways[:, place]
    attempts["fooled_count"] = attempts["fooled_count"] + (fools & probing).sum(1)


def _beside(mask: Tensor, points: Tensor) -> Tensor:
    """The mask (R, g), shaped to go with points (R, g, …)."""
    return mask.view(*mask.shape, *(1,) * (points.ndim - 2))


def _check_starts(starts: Tensor, bounds: Bounds) -> None:
    """TypeError, ValueError: no floats (M, …) inside the bounds."""
    if not isinstance(starts, Tensor) or not starts.is_floating_point() or starts.ndim < 2:
        raise TypeError(f"starts must be a floating point tensor (M, …), got {described(starts)}")
    if not len(starts):
        raise ValueError("starts must be at least one image, got none")
    low, high = float(starts.min()), float(starts.max())
    lowest, highest = (torch.as_tensor(bound, dtype=torch.float64) for bound in bounds)
    if not (low >= lowest.min() and high <= highest.max()):
        raise ValueError(
            f"starts must lie in bounds = {bounds_text(bounds)}, got values from {low:.6g} to "
            f"{high:.6g}"
        )
