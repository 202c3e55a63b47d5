"""What every method of adversarial training shares: the settings of the inner attack, the outer
pass, the ramp of eps, and what a training loop may ask.

Shape suffixes: B images, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ironmoe.attacks.engine.attacked_model import Normalize
from ironmoe.attacks.engine.borrow import other_aux_losses
from ironmoe.attacks.engine.coupling import images_coupled
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.training.checks import (
    check_batch,
    check_count,
    check_inside,
    check_labels,
    check_positive,
    check_scalar,
    may_wait,
    warning_of_radius,
)
from ironmoe.attacks.training.guards.collapse import CollapseAlarm, explaining_nan
from ironmoe.attacks.training.guards.non_finite import check_finite, first_non_finite_layer
from ironmoe.attacks.training.inner.lent import Mode, constant, normal_tensors
from ironmoe.attacks.training.inner.loop import Inner, default_alpha
from ironmoe.attacks.user_warning import warn_user
from ironmoe.kernels.route import may_look
from ironmoe.moe import collect_aux_loss

COUPLED = (
    "model has a capacity or Expert Choice: images of a batch take places from each other, so the "
    "inner attack moves all of them for the loss of all, and an image may be trained on at which "
    "others, not its own pixels, change the prediction"
)


class Strength(NamedTuple):
    """Radius and step length of the inner attack now, in the units of the images."""

    eps: float
    alpha: float


class Update(NamedTuple):
    """A loss, and the weights that a step along its gradient moves.

    loss: scalar with a graph
    group: the name of these weights, which have an optimizer of their own
    """

    loss: Tensor
    group: str


class Attacked(NamedTuple):
    """A batch as an outer loss takes it: images (B, …), labels, and the points (B, …) that the
    inner attack made of the images."""

    images: Tensor
    labels: Tensor
    points: Tensor


Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, labels, points) → scalar, without auxiliary losses."""


class Alarm(Protocol):
    """What watches outer passes for routers that collapse."""

    def looks_at(self, step: int) -> bool:
        """Whether the host may wait for the device in this step."""

    def watching(self, model: nn.Module, step: int) -> AbstractContextManager[None]:
        """Around the outer passes of this step."""


class Perturbation(Protocol):
    """What moves the weights for an outer pass."""

    def move(self, loss: Callable[[], Tensor]) -> None:
        """Between the inner attack and the outer pass. ``loss`` computes that of the batch."""


class TrainingMethod(ABC):
    """A loss that makes its adversarial images itself: ``loss = method(images, labels)``, then
    ``loss.backward()`` and a step of the optimizer, in any loop.

    The auxiliary losses of routers are a part of the loss. They come from the outer passes alone;
    where a method makes several, it takes their mean.

    Args:
        model: from images (B, …) inside ``bounds`` to logits (B, C). It may be wrapped by
            DistributedDataParallel, FSDP2 or torch.compile.
        eps: radius of the perturbations, in the units of the images.
        norm, bounds, mode, routing, normalize, logits_fn, autocast_dtype: as in ``Inner``, for the
            inner attack; the last three hold for the outer pass, too.
        steps: of the inner attack.
        alpha: step length; None: min(1.25, max(2.5 / steps, 0.1)) · eps.
        ramp_steps: eps grows linearly over this many batches. Small models learn nothing where they
            meet the full radius from the start.
        label_smoothing: of the outer cross-entropy, in [0, 1).
        auxiliary_loss: False leaves the routers' losses to ``collect_aux_loss``.
        alarm: warns of routers that collapse. "collapse" is a ``CollapseAlarm`` of the method's
            own; None: nothing watches them.

    Attributes:
        step: how many batches came so far, by which eps grows. A loop that splits batches sets it.
        last: numbers of the last update, without a graph and unread by the host: "loss" (), and
            "clean_correct" or "adversarial_correct", (B,) bool, where the method saw these images.

    Raises:
        TypeError, ValueError: an argument that is none of these. In a call: images outside
            ``bounds``, labels that are no classes of the model, a batch of one image with batch
            norm, a model that is not differentiable.
        NonFiniteLoss: the loss is NaN or infinite; on a GPU only in steps in which the alarm looks.
    """

    updates_per_batch: int = 1
    """How many optimizer steps the method makes of a batch."""

    groups: tuple[str, ...] = ("all",)
    """The groups of weights; each has an optimizer of its own."""

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        norm: str = "Linf",
        steps: int = 10,
        alpha: float | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        mode: Mode = "eval",
        routing: RoutingMode | None = None,
        ramp_steps: int = 0,
        label_smoothing: float = 0.0,
        auxiliary_loss: bool = True,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
        autocast_dtype: torch.dtype | None = None,
        alarm: Alarm | Literal["collapse"] | None = "collapse",
    ) -> None:
        check_positive(eps=eps)
        check_count(steps=steps)
        if alpha is not None:
            check_positive(alpha=alpha)
        check_count(ramp_steps=ramp_steps, at_least=0)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")

        self.inner = Inner(
            model,
            norm=norm,
            bounds=bounds,
            mode=mode,
            routing=routing,
            normalize=normalize,
            logits_fn=logits_fn,
            autocast_dtype=autocast_dtype,
        )
        for warning in (
            COUPLED if images_coupled(model) else None,
            warning_of_radius(float(eps), norm, self.inner.bounds),
        ):
            if warning is not None:
                warn_user(warning)
        self.model = model
        self.eps = float(eps)
        self.steps = int(steps)
        self.alpha = default_alpha(self.eps, self.steps) if alpha is None else float(alpha)
        self.ramp_steps = int(ramp_steps)
        self.label_smoothing = float(label_smoothing)
        self.auxiliary_loss = auxiliary_loss
        self.alarm = _alarm_of(alarm)
        self.step = 0
        self.last: dict[str, Tensor] = {}
        self._perturbation: Perturbation | None = None
        self._outer_aux_losses: list[Tensor] = []
        self._has_looked = False

    @property
    def strength(self) -> Strength:
        """Radius and step length at this step: after t batches the share (t + 1) / ramp_steps of
        the full ones, at most 1."""
        share = 1.0 if not self.ramp_steps else min(1.0, (self.step + 1) / self.ramp_steps)
        return Strength(self.eps * share, self.alpha * share)

    def __call__(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Tensor:
        """The loss of one optimizer step, a scalar with a graph.

        Args:
            images: (B, …) float; labels: (B,) int64, or (B, C) probabilities where a method takes
                them.
            slot: which part of a batch this is, where a loop splits batches. A method that keeps
                something from one batch to the next keeps it for each part.
        """
        loss = self._outer(images, labels, self._losses)
        self.step += 1
        return loss

    def updates(self, images: Tensor, labels: Tensor, *, slot: int = 0) -> Iterator[Update]:
        """All optimizer steps that the method makes of a batch. The loop must call ``backward()``
        and ``step()`` before it asks for the next one. Arguments as of a call."""
        yield Update(self(images, labels, slot=slot), "all")

    def parameters_of(self, group: str) -> list[nn.Parameter]:
        """The weights of a group that require gradients. ValueError: there is no such group."""
        if group not in self.groups:
            raise ValueError(f"group must be one of {self.groups}, got {group!r}")
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, …) what the inner attack makes of the images now, without a graph, in at least
        float32."""
        self._check(images, labels)
        return self._attack(images, labels, self.strength)

    def attack_held_out(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, …) what the inner attack makes now of images that are not trained on."""
        return self._attack(images, labels, self.strength)

    def non_finite_layer(self, images: Tensor) -> str:
        """The first layer whose output at images (B, …) is NaN or infinite, in the precision in
        which the model trains; "" where there is none. The host waits for the device."""
        with normal_tensors():
            return first_non_finite_layer(self.inner.model, lambda: self._ask(constant(images)))

    def state_dict(self) -> dict[str, Any]:
        """What a loop must keep to go on later: numbers and tensors. A name that ends in a point
        and a number belongs to the slot of this number."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called."""
        self.step = int(state["step"])

    @abstractmethod
    def _attack(self, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
        """(B, …) the images that the inner attack makes."""

    def _losses(self, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        """Scalar: the loss without auxiliary losses, at points (B, …) that the inner attack made;
        where a method says nothing else, their cross-entropy. Outer passes go through
        ``_logits``."""
        logits = self._logits(points, images)
        loss = self._cross_entropy(logits, labels)
        self._keep("adversarial_correct", logits, labels)
        return loss

    def _attacked(self, images: Tensor, labels: Tensor) -> Attacked:
        """The batch as ``_losses`` takes it."""
        return Attacked(images, labels, self._attack(images, labels, self.strength))

    def _outer(self, images: Tensor, labels: Tensor, losses: Losses) -> Tensor:
        """What ``losses`` makes of the attacked batch, checked and with the auxiliary losses of its
        outer passes."""
        self._check(images, labels)
        with normal_tensors():
            images, labels = constant(images), constant(labels)
            with explaining_nan(self.inner.model, lambda: self._ask(images), self.step):
                loss = self._loss_of(images, labels, losses)
            if may_look(loss) or (self._looks and may_wait(loss)):
                check_finite(loss, self.inner.model, lambda: self._ask(images), self.step)
            self.last["loss"] = loss.detach()
        return loss

    @property
    def _looks(self) -> bool:
        """Whether the alarm looks in this step."""
        return self.alarm is not None and self.alarm.looks_at(self.step)

    def _loss_of(self, images: Tensor, labels: Tensor, losses: Losses) -> Tensor:
        """As ``_outer``, unchecked."""
        attacked = self._attacked(images, labels)
        if self._perturbation is not None:
            fixed = attacked._replace(points=attacked.points.detach())
            self._perturbation.move(lambda: losses(*fixed))

        self._outer_aux_losses = []
        self.last = {}
        alarm = nullcontext() if self.alarm is None else self.alarm.watching(self.model, self.step)
        # Passes that a user made before this call are none of this loss.
        own = other_aux_losses(self.model) if self.auxiliary_loss else nullcontext()

        with alarm, own:
            loss = losses(*attacked)
            check_scalar(loss, type(self).__name__)
            if self._outer_aux_losses:
                loss = loss + torch.stack(self._outer_aux_losses).mean()
                self._outer_aux_losses = []  # they have graphs
        return loss

    def _logits(self, points: Tensor, images: Tensor) -> Tensor:
        """(B, C) of an outer pass, in at least float32. The model takes the points in the dtype of
        the user's images."""
        logits = self.inner.outer_logits(points, images.dtype)
        if self.auxiliary_loss:  # of compiled code, layers keep those of the last pass only
            self._outer_aux_losses.append(collect_aux_loss(self.model))
        return logits

    def _ask(self, images: Tensor) -> None:
        """A pass for those who watch the layers, in the mode that they choose. It goes past
        DistributedDataParallel, which would wait for the passes of other processes."""
        with self.inner.precise(images):
            self.inner.logits(images)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar: the mean, with label smoothing."""
        check_labels(logits, labels)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _keep(self, name: str, logits: Tensor, labels: Tensor) -> None:
        """Note in ``last`` which of the images the model told right."""
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        self.last[name] = logits.detach().argmax(1) == classes

    def _check(self, images: Tensor, labels: Tensor) -> None:
        check_batch(self.model, images, labels)
        if may_look(images) or (not self._has_looked and may_wait(images)):
            check_inside(images, self.inner.bounds)
            self._has_looked = True

    def __repr__(self) -> str:
        norm = self.inner.ball.norm
        return f"{type(self).__name__}({norm}, eps={self.eps:g}, steps={self.steps})"


def _alarm_of(alarm: Alarm | str | None) -> Alarm | None:
    """The alarm itself; ValueError: a name that is none."""
    if not isinstance(alarm, str):
        return alarm
    if alarm != "collapse":
        raise ValueError(f'alarm must be "collapse", an alarm or None, got {alarm!r}')
    return CollapseAlarm()
