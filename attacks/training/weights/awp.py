"""Adversarial weight perturbation (Wu et al., arXiv 2004.05884): train where the weights, too, are
moved against the loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ironmoe.attacks.training.checks import check_count, check_positive
from ironmoe.attacks.training.inner.lent import ddp_of, leaving_nothing
from ironmoe.attacks.training.method import Strength, TrainingMethod, Update
from ironmoe.attacks.training.weights.end_of_backward import EndOfBackward
from ironmoe.attacks.training.weights.stacked import stacked_experts
from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.parallel.copies import copies
from ironmoe.moe.sharded import give_back_gathered, is_sharded, local_values

SMALLEST_NORM = 1e-20  # that of the official code; a shorter step is none
OWN = (
    "method",
    "gamma",
    "proxy_rate",
    "warmup_steps",
    "groups",
    "updates_per_batch",
    "_end",
)


class AWP(TrainingMethod):
    """A method whose outer pass runs at w + v: ``AWP(TRADES(model, eps))``, used as the method is.

    The method attacks the images once, at w. A step of SGD from w up the outer loss at these images
    gives a direction d for each weight, and v = gamma · ‖w‖ / ‖d‖ · d. Only weights of at least two
    axes are moved. Of stacked experts each is measured on its own; one that got no token stays, and
    so does a weight whose gradient is not finite.

    The weights are w again, bit for bit, when the backward pass ends, when the loss is thrown away,
    when anything raises, and before the next call. Between call and backward pass a loop must not
    use them. The pass that finds d leaves no gradient, auxiliary loss, count or statistics behind;
    it meets the same router noise and dropout as the pass at w + v.

    In several processes each must take part in every call: v follows the mean of their gradients.
    Sharded weights must not defer that mean (``set_requires_gradient_sync(False)``).

    Everything else, such as ``step``, ``last``, ``groups`` or ``state_dict``, is the method's.

    Args:
        method: any training method.
        gamma: length of v in units of the length of w; the paper takes 0.01, with TRADES 0.005.
        warmup_steps: batches before v is used. New models without batch norm, such as transformers,
            may learn nothing at w + v; then take about half of the training.
        proxy_rate: learning rate of the step that gives d. v does not depend on it, except that
            steps shorter than 1e-20 count as none.

    Raises:
        TypeError, ValueError: an argument that is none of these; the model has no weight to move.
    """

    def __init__(
        self,
        method: TrainingMethod,
        *,
        gamma: float = 0.01,
        warmup_steps: int = 0,
        proxy_rate: float = 0.01,
    ) -> None:
        if not isinstance(method, TrainingMethod) or isinstance(method, AWP):
            raise TypeError(
                f"method must be a TrainingMethod without AWP, got {type(method).__name__}"
            )
        check_positive(gamma=gamma, proxy_rate=proxy_rate)
        check_count(warmup_steps=warmup_steps, at_least=0)
        if not any(True for _ in _moved(method.model)):
            raise ValueError(
                "model must have weights of at least two axes that require gradients, which AWP "
                "moves, got none"
            )
        self.method = method
        self.gamma = float(gamma)
        self.warmup_steps = int(warmup_steps)
        self.proxy_rate = float(proxy_rate)
        self.groups = method.groups
        self.updates_per_batch = method.updates_per_batch
        self._end: EndOfBackward | None = None

    def __call__(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Tensor:
        """The loss at w + v; arguments as of the method."""
        with self._moving():
            loss = self.method(images, labels, slot=slot)
        return self._watched(loss)

    def updates(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Iterator[Update]:
        """The updates of the method, each at a w + v of its own."""
        updates = self.method.updates(images, labels, slot=slot)
        while True:
            with self._moving():
                update = next(updates, None)
            if update is None:
                return
            yield update._replace(loss=self._watched(update.loss))

    def restore(self) -> None:
        """Give the weights their values back, if they are moved."""
        if self._end is not None:
            self._end.finish()
            give_back_gathered(self.model)  # where the loss had no backward pass

    def move(self, loss: Callable[[], Tensor]) -> None:
        """Move the weights from w to w + v; what the method calls before its outer pass."""
        if self.method.step < self.warmup_steps:
            return
        give_back_gathered(self.model)
        moved = list(_moved(self.model))
        weights = [weight for weight, _ in moved]
        if not weights:  # of the group that takes its turn
            return
        gradients = self._gradients(loss, weights)
        kept = [weight.detach().clone() for weight in weights]

        self._end = EndOfBackward(lambda: _put(weights, kept))
        with torch.no_grad():
            for (weight, each_expert), gradient in zip(moved, gradients, strict=True):
                weight.add_(self._step(weight, gradient, each_expert))
        torch.clear_autocast_cache()  # of w, where a loop has an autocast around all of this

    def parameters_of(self, group: str) -> list[nn.Parameter]:
        """As of the method."""
        return self.method.parameters_of(group)

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor:
        """As of the method, at w."""
        self.restore()
        return self.method.adversarial(images, labels)

    def attack_held_out(self, images: Tensor, labels: Tensor) -> Tensor:
        """As of the method, at w."""
        self.restore()
        return self.method.attack_held_out(images, labels)

    def state_dict(self) -> dict[str, Any]:
        """That of the method."""
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of the method."""
        self.method.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name in OWN:  # not there yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self.method, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.method, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins at w. Where one is made before the backward pass, that pass is lost."""
        self.restore()
        return vars(self) | {"_end": None}

    def __repr__(self) -> str:
        return f"AWP({self.method!r}, gamma={self.gamma:g})"

    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        self.restore()
        return self.method._attack(images, labels, strength)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Around a call of the method. It begins at w; after an error the weights are w, too."""
        self.restore()
        self.method._perturbation = self
        try:
            yield
        except BaseException:
            self.restore()
            raise
        finally:
            self.method._perturbation = None

    def _watched(self, loss: Tensor) -> Tensor:
        return loss if self._end is None else self._end.watch(loss)

    def _gradients(
        self, loss: Callable[[], Tensor], weights: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """Of the outer loss at w, for each weight, in the mean over processes."""
        with leaving_nothing(self.model), self.inner.without_ddp(), torch.enable_grad():
            if is_sharded(self.model):
                return self._sharded_gradients(loss(), weights)
            gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
        return [self._mean(gradient) for gradient in gradients]

    def _sharded_gradients(self, loss: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """FSDP2 hands gradients over as ``.grad`` alone, where a user's may lie already. Those of
        experts that are shared out are of all tokens that come to them, as FSDP2's are."""
        parameters = list(self.model.parameters())
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            loss.backward()
            found = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        finally:
            for parameter, grad in zip(parameters, kept, strict=True):
                parameter.grad = grad
        ranks_of = copies(self.model)
        return [
            _mean_of_copies(grad, ranks_of[weight])
            if isinstance(grad, DTensor)
            else self._mean(grad)
            for weight, grad in zip(weights, found, strict=True)
        ]

    def _mean(self, gradient: Tensor) -> Tensor:
        """Over the processes that train together."""
        if is_alone():
            return gradient
        ddp = ddp_of(self.model)
        group = None if ddp is None else ddp.process_group
        total = gradient.contiguous()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    def _step(self, weight: Tensor, gradient: Tensor, each_expert: bool) -> Tensor:
        """v, in the shape and dtype of the weight."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        axes = list(range(1 if each_expert else 0, weight.ndim))
        step = self.proxy_rate * gradient.to(wide)

        lengths = [
            torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (weight.to(wide), step)
        ]
        factor = self.gamma * lengths[0] / lengths[1].clamp_min(SMALLEST_NORM)
        # A gradient that is not finite says no direction, and the weight stays.
        moved = (factor * step).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(weight.dtype)
        if isinstance(weight, DTensor) and isinstance(moved, DTensor):
            # a product along an axis of length 1 may lie whole in every process
            return moved.redistribute(weight.device_mesh, weight.placements)
        return moved


def _mean_of_copies(gradient: Tensor, ranks: Group | None) -> Tensor:
    """The mean of a sharded gradient over the ranks that have copies of it."""
    if ranks is None:
        return gradient
    total = gradient.clone()
    ranks.sum(local_values(total))
    return total / ranks.size


def _moved(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """The weights that are moved, each with whether it is one of stacked experts."""
    stacked = stacked_experts(model)
    for weight in model.parameters():
        each_expert = weight in stacked
        if weight.requires_grad and weight.ndim > 1 + each_expert:
            yield weight, each_expert


@torch.no_grad()
def _put(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
    torch.clear_autocast_cache()
