"""What the search may do to routing, for any attack; the model that judges is always the free one.

The modes are in ``ironmoe.attacks.routing.modes``.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.moe import SoftMoE, aux_loss_in_eval, collect_aux_loss
from ironmoe.moe.routing.routed_layers import Decision, Site, routing_sites

Term = Callable[[], Tensor]  # after the forward pass: (R,) added to the loss, or a number for all


class RoutingMode:
    """How the search runs the model. The plain one changes nothing."""

    coupled_by_loss = (
        False  # the loss of one image depends on the others: whole batches are attacked
    )
    adds_term = False  # the loss that is ascended is not a function of the logits alone
    free_forward = True  # the search's forward pass is that of the model that judges

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def record(
        self, model: nn.Module, clean: Tensor, ask: Callable[[Tensor], object] | None = None
    ) -> Attempts:
        """What is kept of clean images (R, …) for their attempts: tensors with the rows first.
        ``ask`` calls the model with images as the search does, normalised and in its precision; by
        default the model itself is called."""
        return {}

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        """Around each forward pass of the search, of all rows at once."""
        yield None


@dataclass(frozen=True)
class AuxiliaryLoss(RoutingMode):
    """The routers' auxiliary losses are ascended along with the loss: ``weight`` times their sum
    (arXiv 2210.10253, its official code with weight 1). They are of a batch, so whole batches are
    attacked.

    The model is in eval mode, where there is no noise and so no load loss. Of the routers of this
    library it needs a ``TopKRouter`` with a weight for another loss; ValueError where no layer
    makes one that depends on the images.
    """

    weight: float = 1.0
    coupled_by_loss = adds_term = True

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        for module in model.modules():
            # of an earlier pass, if the layer does not run in this one
            if "aux_loss" in vars(module):
                vars(module)["aux_loss"] = None

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


def routed_layers(model: nn.Module) -> dict[str, Site]:
    """The MoE layers of a model by name; ValueError if there is none."""
    sites = routing_sites(model)
    if not sites and any(isinstance(module, SoftMoE) for module in model.modules()):
        raise ValueError(
            f"model must choose experts for an attack on its routing, got {type(model).__name__} "
            "with Soft MoE, where every token has a "
            "share in every expert: there is no choice to freeze or to divert, and plain attacks "
            "see all of its gradient"
        )
    if not sites:
        raise ValueError(
            f"model must have MoE layers for an attack on its routing, got {type(model).__name__} "
            "with none"
        )
    return sites


def known_logits(decision: Decision) -> Tensor:
    """(T, E) the router's logits in at least float32; ValueError where a router does not give them,
    or not with the gradient that is wanted."""
    if decision.logits is None:
        raise ValueError(
            f"this routing mode needs the router's logits, which the router of {decision.layer!r} "
            "does not give"
        )
    if torch.is_grad_enabled() and decision.x.requires_grad and not decision.logits.requires_grad:
        raise ValueError(
            "this routing mode needs the gradient of the router's logits, and those of "
            f"{decision.layer!r} have no graph: is its "
            "router under no_grad, or are its logits detached?"
        )
    return decision.logits.to(torch.promote_types(decision.logits.dtype, torch.float32))


def one_pass(name: str, passes: list[Any]) -> Any:
    """What a layer did in one forward pass of the model."""
    if len(passes) != 1:
        raise ValueError(
            f"routing modes need layers that run once in a forward pass, but {name!r} ran "
            f"{len(passes)} times"
        )
    return passes[0]


def members_of(site: Site) -> int:
    """How often each image's tokens come to the layer: M in an ensemble, member after member; else
    1."""
    return int(getattr(site.router, "ensemble_size", 1))


def by_image(values: Tensor, images: int, members: int) -> Tensor:
    """(M · R · N, …) of all tokens → (R, M · N, …) of R images with N tokens each."""
    if len(values) % (images * members):
        raise ValueError(
            f"every image must have as many tokens, got {len(values)} tokens for {images} images "
            f"× {members}"
        )
    return values.unflatten(0, (members, images, -1)).transpose(0, 1).flatten(1, 2)


def by_token(values: Tensor, members: int) -> Tensor:
    """(R, M · N, …) of R images → (M · R · N, …) of all tokens, in the order in which layers see
    them."""
    return values.unflatten(1, (members, -1)).transpose(0, 1).flatten(0, 2)
