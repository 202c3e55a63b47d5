"""The judge: it makes every prediction that counts, of clean images and of candidates alike.

A deterministic model is asked once. A random model is asked many times, and an image counts as one
that has reached the goal only if a test says that the model gives such answers more often than not
(``passes``).
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.budget import Pace
from ironmoe.attacks.engine.judging.passes import hits_needed
from ironmoe.attacks.engine.search import Search


class Judgement(NamedTuple):
    """What the judge says of R points.

    outputs: (R, …) of the first pass
    reached: (R,) bool, they have reached the goal
    prediction: (R,) int64, the class of most passes
    figure: (R,) float64, the goal's figure, the mean of all passes; NaN if it has none
    hits: (R, 2) int64, how many passes reached the goal, in the first and in the second half of
        them; a single pass counts in both
    bad: (R,) bool, some pass gave no finite output
    """

    outputs: Tensor
    reached: Tensor
    prediction: Tensor
    figure: Tensor
    hits: Tensor
    bad: Tensor


class Judge:
    """Predicts what counts.

    Args:
        passes: how often the model is asked about each point: once, or an even number of times.
        model: asked in place of the model that the search runs on; None: that model.

    Attributes:
        pace: how long its calls take.
    """

    def __init__(self, passes: int = 1, model: AttackedModel | None = None) -> None:
        self.passes = passes
        self.model = model
        self.pace = Pace()
        # Sums over the batches judged: how much the share of hits varied from pass to pass, and how
        # much it would have varied if each image had drawn for itself.
        self._varied = 0.0
        self._expected = 0.0

    @property
    def alike(self) -> float:
        """How many times as much a pass varies as one whose images draw for themselves: 1, or more
        for a model that draws once for a whole batch."""
        return max(1.0, self._varied / self._expected) if self._expected > 0 else 1.0

    @property
    def is_patient(self) -> bool:
        """Whether a verdict rests on more than one pass."""
        return self.passes > 1

    @property
    def is_another(self) -> bool:
        """Whether it judges another model than the searches run on: a transfer, in which no search
        asks the judge."""
        return self.model is not None

    def asked(self, attack: Search) -> AttackedModel:
        """The model whose predictions count for this attack."""
        return self.model or attack.attacked_model

    def __call__(
        self,
        attack: Search,
        points: Tensor,
        columns: Mapping[str, Tensor],
        tests: Sequence[int] | None = None,
        *,
        are_clean: bool = False,
    ) -> Judgement:
        """Judge points (R, …).

        Args:
            attack: says what reaches its goal.
            columns: attempts, or of these what the goal and the model need: ``label``, and what
                came with the images.
            tests: for each point, how many tests were made before at its image; None: none.
            are_clean: the points are images of the data, and it is not known yet whether their
                labels go with the model's outputs.

        Raises:
            ValueError: labels that do not.
        """
        began = time.perf_counter()
        judgement = self._judged(attack, points, columns, tests, are_clean)
        self.pace.add(1, self.passes * len(points), time.perf_counter() - began)
        return judgement

    def _judged(
        self,
        attack: Search,
        points: Tensor,
        columns: Mapping[str, Tensor],
        tests: Sequence[int] | None,
        are_clean: bool,
    ) -> Judgement:
        model = self.asked(attack)
        outputs = model.judge(points, columns)
        if are_clean:
            attack.goal.check(outputs, columns["label"])
        reached = attack.fooled(outputs, columns)
        prediction = attack.goal.prediction(outputs)
        figure = _figure(attack, outputs, columns)
        bad = attack.goal.bad(outputs)
        if not self.is_patient:
            hits = reached.long().unsqueeze(1).expand(-1, 2)
            return Judgement(outputs, reached, prediction, figure, hits, bad)

        verdicts = [reached]
        predictions = [prediction]
        figures = [figure]
        for _ in range(self.passes - 1):
            again = model.judge(points, columns)
            verdicts.append(attack.fooled(again, columns))
            predictions.append(attack.goal.prediction(again))
            figures.append(_figure(attack, again, columns))
            bad = bad | attack.goal.bad(again)

        table = torch.stack(verdicts)
        self._note(table.double())
        hits = table.long().view(2, self.passes // 2, -1).sum(1).t()
        needed = [hits_needed(self.passes, earlier) for earlier in tests or [0] * len(points)]
        return Judgement(
            outputs=outputs,
            reached=hits.sum(1) >= torch.tensor(needed, device=hits.device),
            prediction=torch.stack(predictions).mode(0).values,
            figure=torch.stack(figures).mean(0),
            hits=hits,
            bad=bad,
        )

    def _note(self, table: Tensor) -> None:
        """table (passes, R), 1 where a pass reached the goal at an image."""
        count = table.shape[1]
        if count > 1:
            within = table.var(0).mean()
            self._varied += float(table.mean(1).var()) * count
            self._expected += float(within)


def _figure(attack: Search, outputs: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    figure = attack.goal.figure(outputs, columns["label"])
    if figure is None:
        return torch.full((len(outputs),), float("nan"), dtype=torch.float64, device=outputs.device)
    return figure.double()
