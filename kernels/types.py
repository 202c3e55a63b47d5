"""What several operators hand to each other: decisions of a router, and where the rows lie.

Twins and Triton kernels both read this file; it imports neither.
"""

from typing import NamedTuple

from torch import Tensor

# How often the search for a projection onto ball and box looks for clipped coordinates. Each round
# clips at least one more; a handful is usual.
MAX_PROJECTION_ROUNDS = 50


class Routing(NamedTuple):
    """Which experts each token takes, and with which weight.

    gates:   (T, K) float32 (float64 for float64 logits), the weight of each choice
    experts: (T, K) int32, best choice first; ``experts == E`` marks a dropped choice, whose gate is
        0
    """

    gates: Tensor
    experts: Tensor


class ExpertGroups(NamedTuple):
    """Group-limited selection (DeepSeek-V2/V3): only the best ``keep`` of ``num_groups`` equal
    groups of experts compete.

    score: how good a group is: "max", its best expert, or "top2_sum", the sum of its best two.
    """

    num_groups: int
    keep: int
    score: str = "top2_sum"


class GateRule(NamedTuple):
    """How the logits of the chosen experts become gates.

    score: a name in ``ironmoe.kernels.scores.SCORES``.
    order: "score_first" scores all experts and chooses then, "topk_first" scores the chosen ones
        only.
    renormalize: divide the gates of a token by their sum.
    scale: factor on the gates at the end.
    """

    score: str = "softmax"
    order: str = "score_first"
    renormalize: bool = False
    scale: float = 1.0


class Dispatch(NamedTuple):
    """Where every choice goes when the R = T·K choices are sorted by expert (stably, so by token
    inside an expert).

    offsets:   (E + 1,) int32; the rows of expert e are offsets[e] … offsets[e + 1] − 1. offsets[E]
        counts the kept choices
    row_token: (R,) int32; the token each row reads
    row_slot:  (R,) int32; which of its token's K choices the row is
    slot_row:  (T, K) int32; the row of each choice, −1 for a dropped one

    Rows from offsets[E] on belong to the dropped choices (sentinel expert E): no expert works on
    them.
    """

    offsets: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor
