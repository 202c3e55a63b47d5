"""The loop of every inner attack: ask the lent model for a gradient, take a step, n times.

It is not the engine of evaluations. That one leaves misclassified images as they are and confirms
every success; early in training most of a batch would stay clean. Here every image moves in every
step, and nothing is looked at: shapes depend on no value, and the host never waits for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ironmoe.attacks.balls.ball import Ball, ball_of
from ironmoe.attacks.balls.checked import checked_bounds
from ironmoe.attacks.engine.attacked_model import AttackedModel, Normalize
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.goals.goal import Goal
from ironmoe.attacks.model_errors import NoGradient
from ironmoe.attacks.training.checks import check_inside, check_tensors
from ironmoe.attacks.training.inner.lent import (
    Mode,
    check_mode,
    constant,
    inside_of_ddp,
    lent,
    normal_tensors,
)
from ironmoe.kernels.route import may_look

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), labels (B, …)) → (B,), what the images of a batch raise."""

START_NOISE = 1e-3  # the standard deviation of TRADES' start
ALL_BITS = 2**63


class Outputs(Goal):
    """Takes any float tensor (B, …) of the model: training says by its loss what is wanted."""

    def reached(self, outputs: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "adversarial training"


class Inner:
    """A model as inner attacks ask it, and the box and norm of their perturbations.

    Args:
        model: from images (B, …) to logits (B, C), or to an object that has them as ``.logits``.
        norm: "Linf", "L2", or any registered norm.
        bounds: lowest and highest valid pixel; None: any value is valid.
        mode: "eval", in which images of a batch do not influence each other through dropout,
            router noise or batch statistics; "train" leaves the model in the mode in which it is.
        routing: a routing mode of ``ironmoe.attacks``, such as ``GatesOnly()``: the gradient, or
            the loss, of the inner attack knows the routing in another way. The outer pass is free.
        normalize: (mean, std) of each channel, as of every attack.
        logits_fn: takes the logits out of the model's output.
        autocast_dtype: torch.bfloat16 or torch.float16: the model runs under autocast. None: as it
            runs where the method is called. Perturbations, signs and losses are float32 anyway.

    Raises:
        TypeError, ValueError: an argument that is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str = "Linf",
        bounds: tuple[float, float] | None = (0.0, 1.0),
        mode: Mode = "eval",
        routing: RoutingMode | None = None,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be an nn.Module, whose weights can be trained, got "
                f"{type(model).__name__}"
            )
        check_mode(mode)
        self.ball = ball_of(norm)
        pair = (float("-inf"), float("inf")) if bounds is None else bounds
        finite_for = f"norm={norm!r}" if self.ball.needs_finite_bounds else None
        low, high = checked_bounds(pair, finite_for=finite_for)
        self.bounds = (float(low), float(high))
        if autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                "autocast_dtype must be None, torch.bfloat16 or torch.float16, got "
                f"{autocast_dtype}"
            )
        self.mode: Mode = mode
        self.autocast_dtype = autocast_dtype
        self.outer_model = AttackedModel(
            model, normalize, logits_fn, autocast_dtype, None, Outputs()
        )
        self.asked = AttackedModel(
            inside_of_ddp(model), normalize, logits_fn, autocast_dtype, routing, Outputs()
        )

    @property
    def model(self) -> nn.Module:
        """The user's model, without the wrapper of DistributedDataParallel."""
        return cast(nn.Module, self.asked.model)

    def around(self, images: Tensor, eps: float | Tensor) -> Ball:
        """The balls of radius ``eps`` around the images, in at least float32. ValueError: the
        images lie outside ``bounds``, which is looked at on CPU alone."""
        if may_look(images):
            check_inside(images, self.bounds)
        master = images.detach().to(torch.promote_types(images.dtype, torch.float32))
        return self.ball(master, _of_each(eps, master), self.bounds)

    def ascend(
        self,
        images: Tensor,
        labels: Tensor,
        objective: Objective,
        *,
        eps: float | Tensor,
        alpha: float | Tensor,
        steps: int,
        start: str | Tensor = "uniform",
    ) -> Tensor:
        """(B, …) images after ``steps`` steps of length ``alpha`` along the gradient of the summed
        objective, each projected onto ball and box; in at least float32, without a graph.

        Args:
            images: (B, …) float, inside ``bounds``.
            labels: (B, …), whatever the objective takes.
            eps, alpha: numbers, or tensors () that a CUDA graph may fill anew.
            start: "uniform" in the ball; "normal", TRADES' N(0, 0.001²) around the image; "clean",
                the image; or a tensor (B, …), which is projected.

        Raises:
            TypeError: images are no float tensor (B, …), or there are not B labels.
            ValueError: the model is not differentiable, or images lie outside ``bounds``.
        """
        check_tensors(images, labels)
        with normal_tensors():
            images, labels = constant(images), constant(labels)
            ball = self.around(images, eps)
            point = start_point(ball, start)
            step_length = _of_each(alpha, point)

            with self.running(images):
                attempts = self.asked.record(ball.center) | {"label": labels}
                for _ in range(steps):
                    attempts["point"] = point
                    point = ball.step(point, self._gradient(attempts, objective), step_length)
        return point

    @contextmanager
    def running(self, images: Tensor) -> Iterator[None]:
        """Inside the block the model is lent, and runs in the precision in which it trains."""
        with lent(self.model, self.mode), self.precise(images):
            yield

    @contextmanager
    def precise(self, images: Tensor) -> Iterator[None]:
        """Inside the block the model takes images in the dtype of these, and runs in the precision
        in which it trains."""
        device = images.device.type
        self.asked.image_dtype = images.dtype
        self.asked.attack_dtype = self._dtype(device)

        # A cast of a weight that is kept would have no graph, and the outer pass would use it.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            yield

    def gradient(self, points: Tensor, labels: Tensor, objective: Objective) -> Tensor:
        """(B, …) of the summed objective at these points, of the lent model inside ``running``."""
        attempts = self.asked.record(points) | {"label": labels, "point": points}
        return self._gradient(attempts, objective)

    def logits(self, images: Tensor) -> Tensor:
        """(B, C) of the lent model inside ``running``, in at least float32, without a graph."""
        with torch.no_grad(), self.asked.precision(images):
            logits = self.asked.logits(images)
        return _wide(logits)

    def outer_logits(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, C) of the model as it trains, in at least float32, with a graph to its weights.

        dtype: of the images as the model takes them.
        """
        self.outer_model.image_dtype = dtype
        self.outer_model.attack_dtype = self._dtype(images.device.type)
        with self.outer_model.precision(images):
            logits = self.outer_model.logits(images)
        return _wide(logits)

    @contextmanager
    def without_ddp(self) -> Iterator[None]:
        """Inside the block outer passes go past DistributedDataParallel, which averages no gradient
        of theirs and waits for none."""
        outer, self.outer_model = self.outer_model, self.asked
        try:
            yield
        finally:
            self.outer_model = outer

    def _gradient(self, attempts: Attempts, objective: Objective) -> Tensor:
        """(B, …) of the summed objective at the points of the attempts."""
        try:
            answer = self.asked.ask(
                attempts, lambda logits, columns: objective(logits, columns["label"])
            )
        except NoGradient as error:
            raise ValueError(f"{error.what}; adversarial training follows it") from error
        assert answer.grad is not None
        return answer.grad

    def _dtype(self, device: str) -> torch.dtype | None:
        """Of the autocast: the user's choice, else the one that is in force."""
        if self.autocast_dtype is None and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.autocast_dtype


def start_point(ball: Ball, start: str | Tensor) -> Tensor:
    """(B, …) where an inner attack begins; see ``Inner.ascend``.

    Random numbers come from torch's generator of the device, so ``torch.manual_seed`` repeats them.
    """
    if isinstance(start, Tensor):
        if start.shape != ball.center.shape:
            raise ValueError(
                f"start must have the shape of the images, {tuple(ball.center.shape)}, got "
                f"{tuple(start.shape)}"
            )
        return ball.project(start.detach().to(ball.center))
    if start == "clean":
        return ball.center
    if start == "normal":
        return ball.project(ball.center + START_NOISE * torch.randn_like(ball.center))
    if start == "uniform":
        keys = torch.empty_like(ball.eps, dtype=torch.int64).random_(-ALL_BITS, None)
        return ball.random_point(keys)
    raise ValueError(f'start must be "uniform", "normal", "clean" or a tensor, got {start!r}')


def default_alpha(eps: float, steps: int) -> float:
    """The step length where a user gives none: 2.5 · eps / steps as in the attack of Madry et al.
    (arXiv 1706.06083), at least eps / 10 and at most 1.25 · eps."""
    return eps * min(1.25, max(2.5 / max(steps, 1), 0.1))


def _of_each(value: float | Tensor, images: Tensor) -> Tensor:
    """(B,) float64, the value for each image, made without a copy from the host."""
    if isinstance(value, Tensor):
        return value.to(torch.float64).expand(len(images))
    return torch.full((len(images),), value, dtype=torch.float64, device=images.device)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
