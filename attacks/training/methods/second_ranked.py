"""Experts that come second in the router's order are trained, too: the regulariser of RT-ER (Zhang
et al., ICML 2025, arXiv 2502.06832)."""

from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.routing.layers import members_of, routed_layers
from ironmoe.attacks.training.checks import check_factor
from ironmoe.attacks.training.guards.collapse import steered
from ironmoe.attacks.training.inner.attacks import kl_divergence, pgd
from ironmoe.attacks.training.method import Attacked, Strength, TrainingMethod
from ironmoe.attacks.training.registry import register_training_method
from ironmoe.attacks.training.weights.end_of_backward import during_backward
from ironmoe.kernels import Routing
from ironmoe.kernels.route import recomputing
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.gates import gates_for
from ironmoe.moe.routing.intervene import intervene
from ironmoe.moe.routing.ranks import by_rank, ranking
from ironmoe.moe.routing.routed_layers import Decision


@register_training_method(
    "second-ranked",
    summary="Cross-entropy of attacked images, plus the divergence that an attack of its own makes "
    "in the model with the experts that come next in the router's order.",
    cost="4n + 9",
    source="2502.06832",
    takes=("beta",),
    needs_experts=True,
)
class SecondRanked(TrainingMethod):
    """CE(f(x′)) + beta · mean KL(f₂(x₂′) ‖ f₂(x)). f₂ is the model in which each token has the
    experts of ranks first … first + K − 1 in place of its own K; both attacks are PGD on the
    cross-entropy, that of x₂′ on f₂.

    It costs a second attack, and an outer pass of f₂ that has x₂′ and x as one batch of 2B images.
    A capacity, or batch norm, sees these as one batch.

    Args (beyond those of ``TrainingMethod``):
        beta: 6 in the paper.
        first: the first rank of f₂; None: K + 1. A layer needs first + K − 1 experts.

    Raises:
        ValueError: in addition, the model has no MoE layer that chooses experts, or one with too
            few of them.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        beta: float = 6.0,
        first: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **options)
        check_factor(beta=beta)
        if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
            raise TypeError(f"first must be an int or None, got {first!r}")
        self.beta = float(beta)
        self.first = first

        for name, site in routed_layers(model).items():
            top_k = getattr(site.router and unwrapped(site.router), "top_k", None)
            if isinstance(top_k, int):
                _first_rank(first, name, site.num_experts // members_of(site), top_k)

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        eps, alpha = strength
        return pgd(self.inner, images, labels, eps=eps, alpha=alpha, steps=self.steps)

    def _attacked(self, images: Tensor, labels: Tensor) -> Attacked:
        """Its points are (2B, …): x′, then x₂′."""
        points = self._attack(images, labels, self.strength)
        with intervene(self.model, _SecondRanks(self.model, self.first)):
            second_points = self._attack(images, labels, self.strength)
        return Attacked(images, labels, torch.cat([points, second_points]))

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        points, second_points = points.tensor_split(2)
        logits = self._logits(points, images)
        loss = self._cross_entropy(logits, labels)
        self._keep("adversarial_correct", logits, labels)

        ranks = _SecondRanks(self.model, self.first)
        both = torch.cat([second_points, images.to(second_points)])
        with intervene(self.model, ranks), steered():
            attacked, clean = self._logits(both, images).tensor_split(2)
        ranks.in_forward_pass = False

        loss = loss + self.beta * kl_divergence(attacked, clean).mean()
        # Checkpointing routes again in the backward pass.
        during_backward(loss, lambda: intervene(self.model, ranks))
        return loss


class _SecondRanks:
    """The policy of f₂. In contrast to ``UseRanks`` it never waits for a device, and it knows the
    passes of f₂ when checkpointing repeats them: by their number of tokens, which no pass of f
    has.

    in_forward_pass: steer every pass; False: those alone that a backward pass repeats.
    """

    def __init__(self, model: nn.Module, first: int | None) -> None:
        self.in_forward_pass = True
        self.first = first
        self.members = {name: members_of(site) for name, site in routed_layers(model).items()}
        self.tokens: dict[str, int] = {}

    def __call__(self, decision: Decision) -> Routing:
        tokens = len(decision.x)
        if self.in_forward_pass:
            self.tokens[decision.layer] = tokens
        elif not recomputing() or self.tokens.get(decision.layer) != tokens:
            return decision.routing

        top_k = decision.routing.experts.shape[1]
        num_experts = decision.num_experts // self.members[decision.layer]
        first = _first_rank(self.first, decision.layer, num_experts, top_k)
        ranked = decision._replace(routing=by_rank(decision.routing, decision.num_experts))
        experts_TK = ranking(ranked)[:, first - 1 : first - 1 + top_k].to(torch.int32)
        return Routing(gates_for(ranked, experts_TK, None, decision.logits), experts_TK)


def _first_rank(first: int | None, layer: str, num_experts: int, top_k: int) -> int:
    """``first``, or K + 1. ValueError: there are not K experts from this rank on."""
    rank = top_k + 1 if first is None else first
    last = num_experts - top_k + 1
    if not 1 <= rank <= last:
        chosen = f"{rank}, which is top_k + 1" if first is None else str(rank)
        raise ValueError(
            f"first must be from 1 to {last} in {layer!r} with num_experts={num_experts} and "
            f"top_k={top_k}, got {chosen}"
        )
    return rank
