"""Routing in the loss: the search drives router probabilities away from the clean image's, or
towards an expert."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex, cast

import torch
from torch import Tensor, nn

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.routing_mode import RoutingMode, Term
from ironmoe.attacks.routing.auxiliary_loss import check_weight
from ironmoe.attacks.routing.layers import (
    by_image,
    mean_over_tokens,
    members_of,
    one_pass,
    routed_layers,
    router_logits,
)
from ironmoe.moe.routing.routed_layers import RoutedLayer


@dataclass(frozen=True)
class RoutingDivergence(RoutingMode):
    """Adds ``weight`` times a divergence of routing to each image's loss, a mean over its tokens
    and over layers:

    - towards="away": KL(softmax of the clean image's router logits ‖ that of the present ones), as
      AdvMoE attacks its router (ICCV 2023). At the clean image itself it is 0 and so is its
      gradient: begin at a random start.
    - towards="weakest": the log-probability of the expert that the router liked least in the clean
      image (arXiv 2602.01369).
    - towards=e: the log-probability of expert e; not in ensembles, whose members do not share it.

    Targeted attacks raise it, too. FAB and DeepFool refuse it, since they take their gradients for
    those of logit differences. To attack routing alone, give the attack a loss of 0:
    ``loss=lambda logits, labels: 0 * logits[:, 0]``.
    """

    weight: float = 1.0
    towards: str | int = "away"
    adds_term = True

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if isinstance(self.towards, str) and self.towards in ("away", "weakest"):
            return

        expert = _expert_number(self.towards)
        if expert is None:
            raise ValueError(
                'towards must be "away", "weakest" or the number of an expert, got '
                f"{self.towards!r}"
            )
        object.__setattr__(self, "towards", expert)  # an int also where a NumPy integer came

    @torch.no_grad()
    def record(
        self, model: nn.Module, clean: Tensor, ask: Callable[[Tensor], object] | None = None
    ) -> Attempts:
        layers = routed_layers(model)
        if isinstance(self.towards, int):
            _check_expert(self.towards, layers)
            return {}

        with router_logits(model, layers) as seen:
            (ask or model)(clean)
        # The pass just made counts.
        attempts = {"forwards": torch.ones(len(clean), dtype=torch.int64, device=clean.device)}
        for number, name in enumerate(layers):
            if not seen[name]:  # the layer did not run
                continue
            logits_TE, _ = one_pass(name, seen[name])
            logits_RNE = by_image(logits_TE, len(clean), members_of(layers[name]))
            if self.towards == "away":
                kept = logits_RNE.log_softmax(-1)
            else:  # the weakest of the experts that the router does not rule out by −∞
                kept = logits_RNE.masked_fill(logits_RNE.isneginf(), float("inf")).argmin(-1)
            attempts[f"routing.{number}.clean"] = kept
        return attempts

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        layers = routed_layers(model)
        with router_logits(model, layers) as seen:

            def term() -> Tensor:
                divergences = []
                for number, (name, site) in enumerate(layers.items()):
                    if not seen[name]:
                        continue
                    logits_TE, mask_T = one_pass(name, seen[name])
                    images, members = len(attempts["label"]), members_of(site)
                    logits_RNE = by_image(logits_TE, images, members)
                    divergence_RN = self._divergence(logits_RNE, attempts, number)
                    mask_RN = None if mask_T is None else by_image(mask_T, images, members)
                    divergences.append(mean_over_tokens(divergence_RN, mask_RN))
                return self.weight * torch.stack(divergences).mean(0)

            yield term

    def _divergence(self, logits_RNE: Tensor, attempts: Attempts, number: int) -> Tensor:
        """(R, N) the divergence of one layer at each token."""
        log_q_RNE = logits_RNE.log_softmax(-1)
        if isinstance(self.towards, int):
            return log_q_RNE[..., self.towards]

        clean = attempts[f"routing.{number}.clean"]
        if self.towards == "weakest":
            return log_q_RNE.gather(-1, clean.unsqueeze(-1)).squeeze(-1)

        # The experts of other members of an ensemble have probability 0. They add 0, not 0 · ∞.
        ruled_out = clean.isneginf()
        difference_RNE = clean.masked_fill(ruled_out, 0) - log_q_RNE.masked_fill(ruled_out, 0)
        return (clean.exp() * difference_RNE).sum(-1)


def _expert_number(towards: object) -> int | None:
    """``towards`` as the number of an expert; None if it is no such number."""
    try:
        number = -1 if isinstance(towards, bool) else index(cast(SupportsIndex, towards))
    except TypeError:
        return None
    return number if number >= 0 else None


def _check_expert(number: int, layers: dict[str, RoutedLayer]) -> None:
    """ValueError: a layer has no expert of this number, or several."""
    for name, site in layers.items():
        if number >= site.num_experts:
            raise ValueError(
                f"towards must be below the {site.num_experts} experts of {name!r}, got {number}"
            )
        if members_of(site) > 1:
            raise ValueError(
                f'towards must be "away" or "weakest" for {name!r}, whose ensemble '
                f"members share no expert, got {number}"
            )
