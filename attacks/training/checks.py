"""What a training method checks before it trains on a batch. Values are read on CPU, where that
costs nothing; on a GPU those of the first batch alone."""

import math
import operator
from contextlib import suppress
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ironmoe.attacks.engine.inputs import DIVIDE, are_of_255, bytes_advice
from ironmoe.attacks.goals.goal import described
from ironmoe.attacks.goals.labels import label_advice
from ironmoe.kernels.route import may_look, transformed

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_positive(**values: float) -> None:
    """TypeError, ValueError: a value that is not a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(_number(name, value)) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")


def check_factor(**values: float) -> None:
    """TypeError, ValueError: a value that is not a finite number of at least 0."""
    for name, value in values.items():
        if not (math.isfinite(_number(name, value)) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_count(*, at_least: int = 1, **values: SupportsIndex) -> None:
    """TypeError, ValueError: a value that is not a whole number of at least ``at_least``."""
    for name, value in values.items():
        try:
            count = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be a whole number, got {value!r}") from None
        if count < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {count}")


def _number(name: str, value: Any) -> float:
    """The value as a float. TypeError: it is no number."""
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    got = described(value) if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"{name} must be a number, got {got}")


def check_strength(**values: float | Tensor) -> None:
    """TypeError, ValueError: a radius or a step length that is not finite and above 0. A tensor is
    read on CPU alone."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            check_positive(**{name: value})
        elif may_look(value) and not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(f"{name} must be finite and above 0, got {value.tolist()}")


def check_one_step(steps: int) -> None:
    """ValueError: a number of steps for a method that makes one."""
    if steps != 1:
        raise ValueError(f"steps must be 1 for a single-step method, got {steps}")


def check_batch(model: nn.Module, images: Any, labels: Any) -> None:
    """TypeError, ValueError: images and labels that cannot be trained on."""
    check_tensors(images, labels)
    if len(images) == 1 and _has_batch_statistics(model):
        raise ValueError(
            "images must be at least 2 where batch norm trains, got a batch of 1, in which it has "
            "nothing to compare an image with; drop the last batch, or put the batch norm layers "
            "into eval mode"
        )


def check_tensors(images: Any, labels: Any) -> None:
    """TypeError, ValueError: no images (B, …), or not as many labels."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
        raise TypeError(
            f"images must be a float tensor (B, …), got {described(images)}{bytes_advice(images)}"
        )
    if not isinstance(labels, Tensor) or not labels.ndim or len(labels) != len(images):
        raise TypeError(
            f"labels must be a tensor ({len(images)}, …), got {described(labels)}"
            f"{label_advice(labels, len(images))}"
        )
    if not len(images):
        raise ValueError("images must be at least one, got a batch of 0")


def may_wait(images: Tensor) -> bool:
    """Whether values can be read at all: neither a trace nor a CUDA graph is being recorded."""
    if may_look(images):
        return True
    is_traced = torch.compiler.is_compiling() or isinstance(images, FakeTensor) or transformed()
    return not is_traced and images.is_cuda and not torch.cuda.is_current_stream_capturing()


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """TypeError, ValueError: labels that are neither classes nor probabilities of these logits
    (B, C)."""
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels must be int64 classes ({len(logits)},), or probabilities in the shape of "
                f"the logits, {tuple(logits.shape)}, got {described(labels)}"
                f"{label_advice(labels, len(logits))}"
            )
        return
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise TypeError(
            f"labels must be int64 classes (B,), got {described(labels)}"
            f"{label_advice(labels, len(logits))}"
        )
    check_logits(logits)
    if may_look(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {logits.shape[1] - 1}, got {int(labels.min())} … "
            f"{int(labels.max())}"
        )


def warning_of_radius(eps: float, norm: str, bounds: tuple[float, float]) -> str | None:
    """What to say of a radius that is wider than the range of the pixels."""
    low, high = bounds
    if norm != "Linf" or eps <= high - low:
        return None
    return (
        f"eps = {eps:g} is more than the range of the pixels, from {low:g} to {high:g}, so every "
        "image may become any other one; eps is in the units of the images, such as 8 / 255 where "
        "they lie in [0, 1]"
    )


def check_scalar(loss: Any, method: str) -> None:
    """TypeError: what a method's ``_losses`` returned is not one number."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise TypeError(f"{method}._losses must return a scalar tensor, got {described(loss)}")


def check_logits(logits: Tensor) -> None:
    """ValueError: logits that tell no classes."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits (B, C) of at least 2 classes, got {tuple(logits.shape)}"
        )


def _has_batch_statistics(model: nn.Module) -> bool:
    """Whether a layer of batch norm is in training mode."""
    return any(isinstance(module, BATCH_NORMS) and module.training for module in model.modules())


def check_inside(images: Tensor, bounds: tuple[float, float]) -> None:
    """ValueError: pixels that are not finite, or that lie outside the bounds. The host waits for
    the device."""
    low, high = bounds
    finite = images.isfinite()
    if bool((finite & (images >= low) & (images <= high)).all()):
        return
    got = "that are NaN or infinite"
    if bool(finite.all()):
        lowest, highest = images.min().item(), images.max().item()
        got = f"from {lowest:.9g} to {highest:.9g}; " + (
            DIVIDE
            if are_of_255(lowest, highest)
            else "give bounds=, or normalize= and images in [0, 1]"
        )
    raise ValueError(f"images must lie between the bounds {low} and {high}, got values {got}")
