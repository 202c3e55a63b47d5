"""A routing mode that raises the auxiliary losses of the routers along with the loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.routing_mode import RoutingMode, Term
from ironmoe.moe import aux_loss_in_eval, collect_aux_loss


@dataclass(frozen=True)
class AuxiliaryLoss(RoutingMode):
    """The attack raises the routers' auxiliary losses along with its own loss: ``weight`` times
    their sum (arXiv 2210.10253; its official code has weight 1). These losses are those of a whole
    batch, so whole batches are attacked.

    The model is in eval mode, where there is no noise and so no load loss. Of the routers of this
    library the mode needs a ``TopKRouter`` with a weight for another loss. The search raises
    ValueError if no layer makes a loss that depends on the images.
    """

    weight: float = 1.0
    coupled_by_loss = adds_term = True

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        with torch.no_grad():
            collect_aux_loss(model)  # those of earlier passes have no part in this one

        def term() -> Tensor:
            losses = collect_aux_loss(model)
            if torch.is_grad_enabled() and not losses.requires_grad:
                raise ValueError(
                    "an attack on the auxiliary loss needs a model that makes one in eval mode, "
                    f"got {type(model).__name__} without: "
                    "MoE layers whose TopKRouter has importance_weight, balance_weight or "
                    "z_weight above 0 do; dense models, Soft MoE, "
                    "Expert Choice, a load_weight alone, and Hugging Face routers do not"
                )
            return self.weight * losses

        with aux_loss_in_eval(model):
            yield term


def check_weight(weight: float) -> None:
    """ValueError: a factor that is NaN or infinite."""
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite, got {weight}")
