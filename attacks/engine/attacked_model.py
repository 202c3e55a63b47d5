"""The model under attack: images in, checked logits, losses and input gradients out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ironmoe.attacks.device import chosen_device
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.ensemble import Ensemble
from ironmoe.attacks.extra import further_inputs
from ironmoe.attacks.goals.goal import Goal
from ironmoe.attacks.goals.labels import Untargeted
from ironmoe.attacks.model_errors import (
    check_not_labels,
    explaining_dtypes,
    gradient,
    taking_gradients,
)

Model = Callable[..., Any]
Columns = Mapping[str, Tensor]
Normalize = tuple[Sequence[float], Sequence[float]]
Objective = Callable[[Tensor, Attempts], Tensor]


class Answer(NamedTuple):
    """What the model says about R points.

    logits, loss: (R, …), as the goal takes them, and (R,), in at least float32
    grad: (R, …) of the summed loss; None if nobody asked for it
    asked: forward passes that each attempt cost: a number for all, or (R,) int64
    used: (R,) how many queries of the attempt this answer counts for
    """

    logits: Tensor
    loss: Tensor
    grad: Tensor | None
    asked: Tensor | int = 1
    used: Tensor | int = 1


class AttackedModel:
    """Calls the user's model: prepares images, checks outputs, counts passes.

    It knows nothing of attacks: the loss comes as a function of outputs and attempts. The model
    gets copies, so that it may write on its inputs.

    Args:
        model: any callable from images (B, …), and what else travels with them (``attacks.extra``),
            to outputs that the goal takes: logits (B, C).
        normalize: (mean, std) of each channel: the model gets (image − mean) / std. None: the image
            itself.
        logits_fn: takes the logits out of the model's output. None: the output itself is the
            logits, or has them as ``.logits``.
        attack_dtype: the search runs under autocast in this dtype; ``predict`` is always in full
            precision.
        routing: what the search does to routing; ``predict`` leaves it free.
        goal: says which outputs it takes.
        device: where callers send images: that of the weights; for a model without any, this one.
    """

    def __init__(
        self,
        model: Model,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
        attack_dtype: torch.dtype | None = None,
        routing: RoutingMode | None = None,
        goal: Goal | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _check_routing(routing, model)
        _check_calls(model, logits_fn)
        if attack_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"attack_dtype must be None, torch.bfloat16 or torch.float16, got {attack_dtype}"
            )

        self.model = model
        self._device = device
        chosen_device(device, model)
        self.goal = goal or Untargeted()
        self.logits_fn = logits_fn
        self.attack_dtype = attack_dtype
        self.routing = routing or RoutingMode()
        self.normalize = None if normalize is None else _checked(normalize)
        self.image_dtype = torch.float32  # callers set it to the dtype of the user's images

        # Both count passes of single images, from the moment this object is made.
        self.forwards = 0
        self.backwards = 0
        self._constants: dict[tuple[torch.dtype, torch.device, int], tuple[Tensor, Tensor]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The four options that the user chose."""
        return {
            name: getattr(self, name)
            for name in ("normalize", "logits_fn", "attack_dtype", "routing")
        }

    @property
    def device(self) -> torch.device | None:
        """Where the model takes images; None: wherever they are. A model may have moved since."""
        return chosen_device(self._device, self.model)

    def logits(self, points: Tensor, columns: Columns | None = None) -> Tensor:
        """(B, …) in the model's dtype, checked by the goal: logits (B, C).

        columns: attempts, or what else has one row a point; the model gets its "extra.…" columns.
        """
        return self._checked(self._output(self.model, points, columns), len(points))

    def _output(self, model: Model, points: Tensor, columns: Columns | None) -> Any:
        """What the model, or a part of it, gives for prepared images."""
        self.forwards += len(points)
        images = points.to(self.image_dtype)
        if self.normalize is not None:
            mean, std = self._shift_and_scale(images)
            images = (images - mean) / std
        elif images is points:
            images = points.clone()

        by_position, by_keyword = further_inputs(columns)
        with explaining_dtypes(self.model, images):
            return model(images, *by_position, **by_keyword)

    def _checked(self, output: Any, count: int) -> Tensor:
        """The outputs that the goal takes, of what the model gave for ``count`` images, in a copy:
        a model may write its next answer where this one is."""
        if self.logits_fn is not None:
            output = self.logits_fn(output)
        elif not isinstance(output, Tensor):
            output = getattr(output, "logits", output)  # Hugging Face models return objects
        return self.goal.checked_outputs(output, count).clone()

    def _parts(self, points: Tensor, columns: Columns) -> list[Tensor]:
        """Outputs (B, …) of the models whose losses are averaged; of a model that is no ensemble,
        of itself."""
        if not self.averages_losses:
            return [self.logits(points, columns)]
        each = self._output(cast(Ensemble, self.model).each, points, columns)
        return [self._checked(output, len(points)) for output in each.unbind(1)]

    @property
    def averages_losses(self) -> bool:
        """Whether the loss is the mean of the losses of several models."""
        return isinstance(self.model, Ensemble) and self.model.by == "loss"

    @property
    def searches_another_model(self) -> bool:
        """Whether the search runs the model in another way than the predictions that count."""
        return self.attack_dtype is not None or not self.routing.free_forward

    def differs_from(self, judge: "AttackedModel") -> bool:
        """Whether the search runs another model than this judge, or runs it in another way."""
        return judge is not self or self.searches_another_model

    @torch.no_grad()
    def judge(self, points: Tensor, columns: Columns | None = None) -> Tensor:
        """(B, …) outputs that verdicts rest on: in full precision, also inside a user's autocast,
        and with free routing. The host does not wait for the device."""
        with torch.autocast(points.device.type, enabled=False):
            return self.logits(points, columns)

    def predict(self, points: Tensor, columns: Columns | None = None) -> Tensor:
        """Outputs of ``judge``. Raises ValueError if they are not finite; the host waits for the
        device."""
        outputs = self.judge(points, columns)
        bad = self.goal.bad(outputs)
        if bool(bad.any()):
            raise ValueError(
                f"model must return finite logits, got NaN for {int(bad.sum())} of {len(bad)} "
                f"examples, first example {int(bad.nonzero()[0])}"
            )
        return outputs

    def record(self, clean: Tensor, columns: Columns | None = None) -> Attempts:
        """What the routing mode keeps of clean images. It shows them to the model as the search
        does: normalised, and in the precision of the search."""

        def ask(images: Tensor) -> Tensor:
            with self.precision(images):
                return self.logits(images, columns)

        return self.routing.record(self.model, clean, ask)  # type: ignore[arg-type]

    def ask(
        self, attempts: Attempts, objective: Objective, want_grad: bool = True, repeats: int = 1
    ) -> Answer:
        """What the model says about ``attempts["point"]``, in the precision of the search. It is
        asked ``repeats`` times, and the answer is the mean: for random models."""
        answers = [self._ask(attempts, objective, want_grad) for _ in range(repeats)]
        if repeats == 1:
            return answers[0]

        outputs = torch.stack([answer.logits for answer in answers])
        logits = outputs.mean(0) if outputs.is_floating_point() else outputs.mode(0).values
        loss = torch.stack([answer.loss for answer in answers]).mean(0)
        grads = [answer.grad for answer in answers if answer.grad is not None]
        return Answer(logits, loss, torch.stack(grads).mean(0) if grads else None, repeats)

    def _ask(self, attempts: Attempts, objective: Objective, want_grad: bool) -> Answer:
        """One forward pass of every point, and one backward pass if gradients are wanted."""
        points = attempts["point"].detach().requires_grad_(want_grad)
        model = cast(nn.Module, self.model)  # it is one if there is a routing mode
        grad = None

        # With activation checkpointing the backward pass routes again, so it belongs inside the
        # mode, too.
        with torch.set_grad_enabled(want_grad), self.routing.around(model, attempts) as term:
            with self.precision(points):
                with taking_gradients(points, lambda same: self._parts(same, attempts)):
                    parts = self._parts(points, attempts)
                extra = term() if term is not None else None

            if want_grad:
                check_not_labels(parts[0])
            if parts[0].is_floating_point():
                wide = torch.promote_types(parts[0].dtype, torch.float32)
                parts = [part.to(wide) for part in parts]
            logits = _mean(parts).detach().clone()  # a user's loss may write on its own
            try:
                loss = _mean([objective(part, attempts) for part in parts])
            except (IndexError, RuntimeError):
                self.goal.check(logits, attempts["label"])  # too few classes, as of a search_model
                raise
            loss = loss if extra is None else loss + extra.to(loss)
            if loss.shape != points.shape[:1]:
                raise ValueError(
                    f"loss must return one value an example, shape {tuple(points.shape[:1])}, got "
                    f"{tuple(loss.shape)}"
                )

            if want_grad:
                grad = self._gradient(loss, points)

        return Answer(logits, loss.detach(), grad)

    def _gradient(self, loss: Tensor, points: Tensor) -> Tensor:
        """(R, …) of the summed loss; each loss depends on its own point, or on a whole group's."""
        mode = "" if type(self.routing) is RoutingMode else f" under {self.routing}"
        grad = gradient(loss, points, mode)
        self.backwards += len(points)
        return grad

    def _shift_and_scale(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std), shaped to go with the images. They are made once, since copying numbers to a
        GPU makes the host wait."""
        assert self.normalize is not None
        _check_channels(self.normalize, images)
        key = images.dtype, images.device, images.ndim
        if key not in self._constants:
            shape = (-1, *(1,) * (images.ndim - 2))
            mean, std = (
                torch.tensor(v, dtype=images.dtype, device=images.device).view(shape)
                for v in self.normalize
            )
            self._constants[key] = mean, std
        return self._constants[key]

    def precision(self, points: Tensor) -> torch.autocast:
        """The autocast context in which the search runs the model."""
        return torch.autocast(
            points.device.type, enabled=self.attack_dtype is not None, dtype=self.attack_dtype
        )


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)


def _check_routing(routing: RoutingMode | None, model: Model) -> None:
    """TypeError: a routing that is no mode, or a model that modes cannot reach into."""
    if routing is None:
        return
    if not isinstance(routing, RoutingMode):
        is_class = isinstance(routing, type)
        got = f"the class {routing.__name__}" if is_class else type(routing).__name__
        raise TypeError(
            f"routing must be None or one mode at a time, such as FrozenRouting(), got {got}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"routing modes need an nn.Module with MoE layers, got {type(model).__name__}"
        )


def _check_calls(model: Model, logits_fn: Callable[[Any], Tensor] | None) -> None:
    """TypeError: a model or a ``logits_fn`` that cannot be called."""
    if not callable(model):
        raise TypeError(
            f"model must be callable, from images to logits, got {type(model).__name__}"
        )
    if logits_fn is not None and not callable(logits_fn):
        raise TypeError(
            "logits_fn must be callable, from the model's output to logits, got "
            f"{type(logits_fn).__name__}"
        )


def _checked(normalize: Normalize) -> tuple[list[float], list[float]]:
    """The means and standard deviations as floats. TypeError, ValueError: they are not that."""
    try:
        mean, std = ([float(v) for v in values] for values in normalize)
    except (TypeError, ValueError):
        raise TypeError(
            f"normalize must be (mean, std) with a number for each channel, got {normalize!r}"
        ) from None

    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(
            f"normalize must be (mean, std) of equal length with std above 0, got {normalize!r}"
        )
    return mean, std


def _check_channels(normalize: tuple[list[float], list[float]], images: Tensor) -> None:
    """ValueError: as many means as the images (B, C, …) have no channels."""
    given = len(normalize[0])
    channels = images.shape[1]
    if given != channels and 1 not in (given, channels):
        raise ValueError(
            "normalize must be (mean, std) with one number each, or one for each of the "
            f"{channels} channels of images (N, {channels}, …), got {given}"
        )
