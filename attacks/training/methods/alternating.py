"""Experts and routers in turns: AdvMoE's idea (Zhang et al., ICCV 2023, arXiv 2308.10110) for
routers that see tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.routing.divergence import RoutingDivergence
from ironmoe.attacks.routing.together import Together
from ironmoe.attacks.training.checks import check_factor
from ironmoe.attacks.training.inner.attacks import pgd
from ironmoe.attacks.training.inner.lent import ddp_of
from ironmoe.attacks.training.method import Strength, Update
from ironmoe.attacks.training.methods.trades import TRADES
from ironmoe.attacks.training.registry import register_training_method
from ironmoe.attacks.training.routers import router_weights, routing_of_passes
from ironmoe.attacks.training.weights.end_of_backward import during_backward
from ironmoe.moe.sharded import is_sharded

Attack = Literal["kl", "ce"]


@register_training_method(
    "alternating",
    summary="Experts and routers take turns, each against an attack on both of them (AdvMoE).",
    cost="4n + 14",
    source="2308.10110",
    takes=("beta", "routing_weight", "routing_beta"),
    needs_experts=True,
)
class Alternating(TRADES):
    """Two updates of each batch, each at points x′ of its own:

    1. "experts", all weights but the routers': CE(x) + beta · KL(p(x) ‖ p(x′)), as ``TRADES``.
    2. "routers", at the updated model: the same loss, plus routing_beta · the mean over layers and
       tokens of KL(routing(x) ‖ routing(x′)), a routing being softmax(router logits).

    The inner attack raises KL(p(x) ‖ p(x′)), or CE(x′), plus routing_weight · the divergence of
    routing (``RoutingDivergence``). The routers' auxiliary losses are a part of both losses. The
    target of the original, expert ``y mod E`` for images of class y, is left out: it is for a
    router that sees a whole image, and would send all tokens of an image to one expert.

    A loss has gradients for its own group alone: the other one is frozen in its passes, also in
    those that checkpointing repeats. Under DistributedDataParallel and FSDP2, which do not let
    weights come and go, both groups get gradients: set those of all weights to None before each
    backward pass, and step the optimizer of the update's group only.

    A call returns the losses of the groups in turns, by ``step``, one for each batch. One optimizer
    may serve both groups then, since it skips weights whose gradient is None.

    Args (beyond those of ``TrainingMethod``):
        attack: "kl" or "ce".
        beta: of KL(p(x) ‖ p(x′)), 6 in the paper.
        routing_weight: of the divergence of routing in the attack.
        routing_beta: of the divergence of routing in the loss for the routers.
        routing: a mode beside the divergence, such as ``StraightThrough()``, through which the
            attack sees experts that were not chosen.

    Raises:
        ValueError: in addition, the model has no MoE layer that chooses experts, or a group has no
            weight that requires gradients, as where routers are frozen. In a call, too.
    """

    updates_per_batch = 2
    groups = ("experts", "routers")

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        attack: Attack = "kl",
        beta: float = 6.0,
        routing_weight: float = 1.0,
        routing_beta: float = 6.0,
        routing: RoutingMode | None = None,
        **options: Any,
    ) -> None:
        check_factor(routing_weight=routing_weight, routing_beta=routing_beta)
        if attack not in get_args(Attack):
            raise ValueError(f'attack must be "kl" or "ce", got {attack!r}')
        if routing_weight:
            divergence = RoutingDivergence(routing_weight)
            routing = divergence if routing is None else Together(routing, divergence)
        super().__init__(model, eps, beta=beta, routing=routing, **options)

        self.attack = attack
        self.routing_weight = float(routing_weight)
        self.routing_beta = float(routing_beta)
        self._check_groups()

    def __call__(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Tensor:
        loss = self._update(images, labels, self.groups[self.step % 2])
        self.step += 1
        return loss

    def updates(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Iterator[Update]:
        step = self.step
        for group in self.groups:
            self.step = step  # updates of other parts may lie between
            loss = self._update(images, labels, group)
            self.step = step + (group == self.groups[-1])
            yield Update(loss, group)

    def parameters_of(self, group: str) -> list[nn.Parameter]:
        super().parameters_of(group)  # ValueError: no such group
        routers = {weight for each in router_weights(self.model).values() for weight in each}
        return [
            weight
            for weight in self.model.parameters()
            if weight.requires_grad and (weight in routers) == (group == "routers")
        ]

    def _update(self, images: Tensor, labels: Tensor, group: str) -> Tensor:
        """The loss of this group, which has gradients for no other."""
        self._check_groups()
        (other,) = set(self.groups) - {group}
        stays = is_sharded(self.model) or ddp_of(self.model) is not None
        others = [] if stays else self.parameters_of(other)

        with _frozen(others):
            loss = self._outer(images, labels, partial(self._losses_of, group))
        # Checkpointing runs the model again there, and must find the weights as they were.
        during_backward(loss, lambda: _frozen(others))
        return loss

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        if self.attack == "kl":
            return super()._attack(images, labels, strength)
        eps, alpha = strength
        return pgd(self.inner, images, labels, eps=eps, alpha=alpha, steps=self.steps)

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        return self._losses_of(self.groups[self.step % 2], images, labels, points)

    def _losses_of(self, group: str, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        if group == "experts" or not self.routing_beta:
            return super()._losses(images, labels, points)
        with routing_of_passes(self.model) as routing:
            loss = super()._losses(images, labels, points)
        return loss + self.routing_beta * routing.divergence()

    def _check_groups(self) -> None:
        """ValueError: a group of weights that cannot be trained."""
        names = [f"{name}.router" if name else "router" for name in router_weights(self.model)]
        if not self.parameters_of("routers"):
            raise ValueError(
                "routers must have a weight that requires gradients where they take turns with "
                f"experts, got none in {', '.join(names)}"
            )
        if not self.parameters_of("experts"):
            raise ValueError(
                "model must have weights beside its routers' that require gradients, got none"
            )


@contextmanager
def _frozen(weights: list[nn.Parameter]) -> Iterator[None]:
    """None of the weights requires gradients inside the block."""
    asked = [weight for weight in weights if weight.requires_grad]
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)
