"""A round of an attack: one question to the model about every attempt, and what follows from it.

This file knows nothing of jobs and of places in the active batch. It sees attempts side by side,
each at a step of its own, in units that count together where images influence each other. Nothing
here waits for the device if ``fixed`` is set.
"""

import torch
from torch import Tensor

from ironmoe.attacks.balls.scaled import ScaledBall
from ironmoe.attacks.engine.attacked_model import Answer
from ironmoe.attacks.engine.attempts import Attempts, select, where
from ironmoe.attacks.engine.counters import count_answer, count_confirmation
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.extra import PREFIX

# Below this many attempts, with or without a gradient, one call with gradients for all of them is
# cheaper than two calls.
SPLIT_FROM = 8
# The verdict on an attempt depends on these columns, and on what came with the image.
JUDGED = (
    *("point", "clean", "label", "eps", "low", "high", "key"),
    *("eps_scale", "low_bound", "high_bound"),
)


class Rounds:
    """The rounds of one attack.

    Args:
        unit_size: images that must stay together, side by side.
        fixed: compute every attempt in every round, so that no shape depends on values; else leave
            out work that is not needed.
        goes_on: an attack that would stop at its first success goes on and keeps its best point,
            since what counts is whether another model falls there.
    """

    def __init__(self, attack: Search, unit_size: int, fixed: bool, goes_on: bool = False) -> None:
        self.attack = attack
        self.unit_size = unit_size
        self.fixed = fixed
        self.goes_on = goes_on
        self.coupled_by_model = attack.coupled_by_model and unit_size > 1

    @property
    def keeps_best(self) -> bool:
        """Whether an attempt goes on after a success, to keep the best of its points. A unit that
        has to be fooled as a whole keeps the point that fools most of its images."""
        return self.attack.keeps == "best" or (
            (self.coupled_by_model or self.goes_on) and self.attack.keeps == "first"
        )

    @property
    def confirms(self) -> bool:
        """Whether the best of an attempt is chosen among points that fool the judging model, too,
        not the search's alone."""
        return self.keeps_best and self.attack.attacked_model.searches_another_model

    def play(self, attempts: Attempts) -> None:
        """Ask the model once about every attempt, and let the attack go on."""
        before = dict(attempts)
        over = attempts["over"]
        last_query = attempts["finished"]

        answer, wanted_grad = self._ask(attempts)
        fooled = self._fooled(attempts, answer)
        count_answer(
            attempts,
            asked=answer.asked,
            loss=answer.loss,
            grad=self._usable(attempts, answer.grad),
            wanted_grad=wanted_grad,
            max_queries=self.attack.max_queries,
        )
        attempts["bad"] = attempts["bad"] | (self._is_bad(answer) & ~over)
        fooled = fooled & attempts["clean_correct"] & attempts["stops"]
        nothing_left = self._judge(attempts, answer, fooled)

        attempts["queries"] = attempts["queries"] + answer.used
        self.attack.advance(attempts, answer.logits, answer.loss, answer.grad)
        self._keep_those_over(attempts, before, over)

        # An attack that keeps the best asks about its last point, too; another leaves that to the
        # prediction that counts.
        at_end = last_query if self.keeps_best else attempts["finished"]
        attempts["over"] = over | nothing_left | at_end | attempts["bad"]

    def _usable(self, attempts: Attempts, grad: Tensor | None) -> Tensor | None:
        """The gradient, 0 for elements that may not move."""
        eps = self.attack.eps
        by_element = "eps_scale" in attempts or (isinstance(eps, Tensor) and eps.ndim > 0)
        if grad is None or not by_element:
            return grad
        ball = self.attack.ball(attempts)
        return torch.where(ball.free, grad, 0) if isinstance(ball, ScaledBall) else grad

    def _ask(self, attempts: Attempts) -> tuple[Answer, Tensor]:
        """(answers to all attempts, for which of them a gradient was taken)."""
        attack = self.attack
        want = None if self.fixed else attack.wants_gradient(attempts)

        if want is None or bool(want.all()):
            return self._ask_all(attempts)

        if not bool(want.any()):
            answer = attack.ask(attempts, False)
            return answer._replace(grad=torch.zeros_like(attempts["point"])), want

        if int(want.sum()) < SPLIT_FROM or int((~want).sum()) < SPLIT_FROM:
            return self._ask_all(attempts)

        return self._ask_in_two_parts(attempts, want), want

    def _ask_all(self, attempts: Attempts) -> tuple[Answer, Tensor]:
        gradient = self.attack.gradient
        return self.attack.ask(attempts, gradient), torch.full_like(attempts["found"], gradient)

    def _ask_in_two_parts(self, attempts: Attempts, want: Tensor) -> Answer:
        """Gradients only of the attempts that want one; 0 for the others."""
        with_grad = want.nonzero().squeeze(1)
        without = (~want).nonzero().squeeze(1)
        first = self.attack.ask(select(attempts, with_grad), True)
        second = self.attack.ask(select(attempts, without), False)
        assert first.grad is not None

        order = torch.cat([with_grad, without]).argsort()
        grad = torch.zeros_like(attempts["point"]).index_copy_(0, with_grad, first.grad)
        return Answer(
            logits=torch.cat([first.logits, second.logits])[order],
            loss=torch.cat([first.loss, second.loss])[order],
            grad=grad,
            asked=first.asked,
        )

    def _fooled(self, attempts: Attempts, answer: Answer) -> Tensor:
        """(R,) bool: the model of the search is fooled, at a distance that counts."""
        fooled = self.attack.fooled(answer.logits, attempts)
        if self.attack.inside:
            return fooled
        distance = self.attack.distance(attempts, attempts["point"])
        return fooled & (distance <= attempts["eps"])

    def _is_bad(self, answer: Answer) -> Tensor:
        """(R,) bool: outputs or gradient are not finite."""
        bad = self.attack.goal.bad(answer.logits)
        if answer.grad is None:
            return bad
        return bad | ~answer.grad.flatten(1).isfinite().all(1)

    def _judge(self, attempts: Attempts, answer: Answer, fooled: Tensor) -> Tensor:
        """Keep the candidate; (R,) bool: nothing is left to look for."""
        fooled = fooled & ~attempts["over"]
        first_time = fooled & ~attempts["found"]
        attempts["found_at"] = torch.where(
            first_time, attempts["queries"] + answer.used - 1, attempts["found_at"]
        )
        attempts["found"] = attempts["found"] | fooled

        if self.attack.keeps == "last":
            return torch.zeros_like(fooled)
        if self.keeps_best:
            return self._keep_best(attempts, answer, fooled)
        counted = self.attack.counted(attempts, attempts["point"])
        attempts["candidate"] = where(first_time, counted, attempts["candidate"])
        return attempts["found"]

    def _keep_best(self, attempts: Attempts, answer: Answer, fooled: Tensor) -> Tensor:
        """The candidate is the point that fools most images of the unit, and of those the one with
        the best score; (R,) bool: it fools all of them, and the attack stops there."""
        if self.confirms:
            fooled = self._confirmed(attempts, fooled)
        score = self.attack.score(attempts, answer.loss).to(attempts["best_score"].dtype)
        count = self.of_unit(fooled.long())
        score = self.of_unit(score)

        more = count > attempts["best_count"]
        as_many = count == attempts["best_count"]
        better = more | (as_many & (score > attempts["best_score"]))
        is_candidate = (attempts["queries"] > 0) | (not self.attack.starts_clean)
        better = better & ~attempts["over"] & is_candidate

        counted = self.attack.counted(attempts, attempts["point"])
        attempts["candidate"] = where(better, counted, attempts["candidate"])
        attempts["best_count"] = torch.where(better, count, attempts["best_count"])
        attempts["best_score"] = torch.where(better, score, attempts["best_score"])

        if self.attack.keeps == "best" or self.goes_on:
            return torch.zeros_like(fooled)
        return count == self.of_unit(attempts["clean_correct"].long())

    def _confirmed(self, attempts: Attempts, fooled: Tensor) -> Tensor:
        """(R,) bool: of the attempts that fooled the search, those that fool the judging model,
        too. Whole units are shown to it."""
        part = {name: attempts[name] for name in JUDGED if name in attempts}
        part |= {name: column for name, column in attempts.items() if name.startswith(PREFIX)}
        asked = torch.ones_like(fooled) if self.fixed else self.of_unit(fooled.long()) > 0
        if not self.fixed:
            part = select(part, asked)
            if not len(part["key"]):
                return fooled

        points = self.attack.counted(part, part["point"])
        points = self.attack.final(part, points)
        verdict = self.attack.fooled(self.attack.attacked_model.judge(points, part), part)
        count_confirmation(attempts, asked)

        if self.fixed:
            return fooled & verdict
        return fooled & torch.zeros_like(fooled).masked_scatter(asked, verdict)

    def of_unit(self, values: Tensor) -> Tensor:
        """(R,) the sum over the images of a unit, where they have to be fooled together."""
        if not self.coupled_by_model:
            return values
        return values.view(-1, self.unit_size).sum(1).repeat_interleave(self.unit_size)

    def _keep_those_over(self, attempts: Attempts, before: Attempts, over: Tensor) -> None:
        """Attempts that are over wait as they are: if their success is not confirmed, they go on
        from there."""
        if not self.fixed and self.unit_size == 1:
            return  # such attempts leave before the next round
        for name, old in before.items():
            if attempts[name] is not old:
                attempts[name] = where(over, old, attempts[name])
