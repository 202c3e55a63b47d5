"""Free adversarial training (Shafahi et al., arXiv 1904.12843): the backward pass that trains the
weights makes the attack, too."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.model_errors import NoGradient, check_leads_to
from ironmoe.attacks.training.checks import check_count, check_one_step
from ironmoe.attacks.training.inner.attacks import pgd
from ironmoe.attacks.training.method import Attacked, Strength, TrainingMethod, Update
from ironmoe.attacks.training.registry import register_training_method


@register_training_method(
    "free",
    summary="Each batch is trained on several times; each backward pass to the weights also moves "
    "the perturbation.",
    cost="3m",
    source="1904.12843",
    takes=("replays",),
    single_step=True,
    ignores=("mode", "routing"),
)
class Free(TrainingMethod):
    """CE(x + δ), m times for a batch. The backward pass of the caller gives the gradient of the
    image as well: δ moves by ``alpha`` along its sign (its direction in L2), and stays in the ball
    of radius eps.

    δ belongs to a place in the batch, not to an image, and lasts from batch to batch; a smaller
    batch takes its first rows. It begins at 0. ``updates`` yields m updates of a batch, and a call
    is one of them: ``for _ in range(free.replays)``.

    Scaling the loss changes nothing, and gradients may be accumulated: the hook sees the gradient
    before anything is added to it. ``backward()`` must reach the image, so it must not be limited
    by ``inputs``.

    Args (beyond those of ``TrainingMethod``):
        replays: m. The paper divides the epochs by it.
        alpha: by default eps.
        steps: must be 1.
        routing: must be None, and ``mode`` is that of ``attack_held_out`` alone: the gradient is
            that of the training pass.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        replays: int = 4,
        steps: int = 1,
        alpha: float | None = None,
        **options: Any,
    ) -> None:
        check_one_step(steps)
        check_count(replays=replays)
        if options.get("routing") is not None:
            raise ValueError(
                "routing must be None for Free, whose attack is the backward pass of training, got "
                f"{options['routing']!r}"
            )
        super().__init__(model, eps, steps=1, alpha=eps if alpha is None else alpha, **options)
        self.replays = int(replays)
        self.updates_per_batch = self.replays
        self._slot = 0
        self._deltas: dict[int, Tensor] = {}
        self._replayed: dict[int, int] = {}
        self._is_checked = False

    def __call__(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Tensor:
        """The loss of one of the m updates of a batch; arguments as of every method."""
        step = self.step
        self._slot = slot
        loss = super().__call__(images, labels, slot=slot)

        self._replayed[slot] = (self._replayed.get(slot, 0) + 1) % self.replays
        if self._replayed[slot]:
            self.step = step  # the batch is not over
        return loss

    def updates(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Iterator[Update]:
        step = self.step
        self._replayed[slot] = 0
        for _ in range(self.replays):
            self.step = step  # parts of a batch may take turns
            yield Update(self(images, labels, slot=slot), "all")

    def attack_held_out(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step from the image: δ belongs to the batches before."""
        eps, alpha = self.strength
        return pgd(self.inner, images, labels, eps=eps, alpha=alpha, steps=1, start="clean")

    def state_dict(self) -> dict[str, Any]:
        """As of every method, with the perturbation of each slot and how often it was replayed."""
        state = super().state_dict()
        state |= {f"delta.{slot}": delta.clone() for slot, delta in self._deltas.items()}
        return state | {f"replayed.{slot}": count for slot, count in self._replayed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._deltas = {slot: delta.clone() for slot, delta in _slots(state, "delta.")}
        self._replayed = {slot: int(count) for slot, count in _slots(state, "replayed.")}

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        center = self.inner.around(images, strength.eps).center
        return (center + self._delta(center, strength)).clamp(*self.inner.bounds)

    def _attacked(self, images: Tensor, labels: Tensor) -> Attacked:
        attacked = super()._attacked(images, labels)
        attacked.points.requires_grad_().register_hook(self._moves(attacked.points))
        return attacked

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        loss = super()._losses(images, labels, points)
        if not self._is_checked and points.requires_grad and torch.is_grad_enabled():
            try:
                check_leads_to(loss, points)
            except NoGradient as error:
                raise ValueError(f"{error.what}; Free moves them by it") from error
            self._is_checked = True
        return loss

    def _moves(self, points: Tensor) -> Callable[[Tensor], None]:
        """What the backward pass calls with the gradient (B, …) of the images."""
        slot, strength = self._slot, self.strength
        delta = self._delta(points.detach(), strength)

        def move(grad: Tensor) -> None:
            # A gradient that overflowed under a scaled loss says nothing.
            grad = grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            moved = self._ball(delta, strength.eps).step(delta, grad, _each(strength.alpha, delta))
            self._deltas[slot] = torch.cat([moved, self._kept(slot, moved)[len(moved) :]])

        return move

    def _delta(self, like: Tensor, strength: Strength) -> Tensor:
        """(B, …) the perturbations of this slot, in the ball of now."""
        kept = self._kept(self._slot, like)[: len(like)]
        missing = like.new_zeros(len(like) - len(kept), *like.shape[1:])
        delta = torch.cat([kept, missing])
        return self._ball(delta, strength.eps).project(delta)

    def _kept(self, slot: int, like: Tensor) -> Tensor:
        """What is kept for images of this shape: none where the former ones had another."""
        kept = self._deltas.get(slot)
        if kept is None or kept.shape[1:] != like.shape[1:]:
            return like.new_zeros(0, *like.shape[1:])
        return kept.to(like)

    def _ball(self, delta: Tensor, eps: float) -> Any:
        low, high = self.inner.bounds
        return self.inner.ball(torch.zeros_like(delta), _each(eps, delta), (low - high, high - low))


def _each(value: float, images: Tensor) -> Tensor:
    return torch.full((len(images),), value, dtype=torch.float64, device=images.device)


def _slots(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[int, Any]]:
    for name, value in state.items():
        if name.startswith(prefix):
            yield int(name.removeprefix(prefix)), value
