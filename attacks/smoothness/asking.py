"""How a measurement asks a model about images, and which images and models it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.coupling import images_per_unit, layer_with_batch_statistics
from ironmoe.attacks.extra import Extra, extra_columns, further_inputs
from ironmoe.attacks.goals.goal import described
from ironmoe.attacks.model_errors import explaining_dtypes


@dataclass(frozen=True)
class Asked:
    """A model with what it takes beside some images, one row an image."""

    model: Any
    columns: dict[str, Tensor] = field(default_factory=dict)

    def part(self, places: slice) -> "Asked":
        """The same model for some of the images."""
        return Asked(self.model, {name: column[places] for name, column in self.columns.items()})

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C) logits of images (B, …). A model may write on what it gets, which is a copy.

        Raises:
            TypeError: the model does not give logits.
            ValueError: they are not finite.
        """
        by_position, by_keyword = further_inputs(self.columns)
        with explaining_dtypes(self.model, x, images_may_change=False):
            output = self.model(x.clone(), *by_position, **by_keyword)

        logits = output if isinstance(output, Tensor) else getattr(output, "logits", output)
        is_tensor = isinstance(logits, Tensor) and logits.is_floating_point()
        if not is_tensor or logits.ndim != 2 or len(logits) != len(x):
            raise TypeError(
                f"model must return a float tensor of logits ({len(x)}, C), got {described(logits)}"
            )
        bad = ~logits.detach().isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(
                f"model must return finite logits, got others for {int(bad.sum())} of {len(bad)} "
                f"images, first image {int(bad.nonzero()[0])} of its batch"
            )
        return logits


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Inside the block the model is borrowed, in eval mode and with frozen weights, and runs in its
    own precision also where the caller is under autocast. ``ironmoe.attacks.engine.borrow`` says
    what comes back afterwards."""
    with borrowed(model), in_own_precision(model):
        yield


@contextmanager
def in_own_precision(model: Any) -> Iterator[None]:
    """Inside the block no autocast of the caller changes the precision of the model."""
    device = "cpu"
    if isinstance(model, torch.nn.Module):
        weight = next(model.parameters(), None)
        device = device if weight is None else weight.device.type
    with torch.autocast(device, enabled=False):
        yield


def asked_about(model: Any, x: Tensor, extra: Extra | None = None) -> tuple[Asked, Tensor]:
    """(the model with its further inputs, the images as constants).

    Raises:
        TypeError: the model is not callable; images that are no float32 or float64 tensor (B, …).
            Differences of lower precision would be rounding.
        ValueError: images that are not finite, or further inputs that do not go with them; a model
            with a layer that lets images influence each other, or with weights that have no
            gradient graph, made under inference mode.
    """
    if not callable(model):
        raise TypeError(
            f"model must be callable, from images to logits, got {type(model).__name__}"
        )
    is_tensor = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)
    if not is_tensor or x.ndim < 2:
        raise TypeError(
            f"x must be a float32 or float64 tensor (B, …), got {described(x)}; differences of "
            "lower precision would be rounding, so measure model.float()"
        )
    if not bool(x.detach().isfinite().all()):
        raise ValueError("x must be finite, got NaN or infinity")
    _check_model(model)
    return Asked(model, extra_columns(extra, len(x))), constant(x)


def _check_model(model: Any) -> None:
    """ValueError: what can be seen of a model without asking it forbids a measurement."""
    if images_per_unit(model, 2) > 1:
        raise ValueError(
            "model must judge each image by itself to be measured, got "
            f"{type(model).__name__}, whose images influence each other (a capacity or Expert "
            "Choice over several images); images_per_group=1 does not couple them"
        )
    layer = layer_with_batch_statistics(model)
    if layer is not None:
        raise ValueError(
            "model must judge each image by itself to be measured, got "
            f"{type(model).__name__}, whose images influence each other: {layer!r} normalises by "
            "the statistics of the batch in eval mode, too"
        )
    if isinstance(model, torch.nn.Module) and any(w.is_inference() for w in model.parameters()):
        raise ValueError(
            f"model must not be made under inference mode, got {type(model).__name__} with weights "
            "that autograd does not take; make it outside, and load its state_dict"
        )


def constant(tensor: Tensor) -> Tensor:
    """Detached; of an inference tensor, a copy that autograd takes."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def chunks(count: int, size: int) -> Iterator[slice]:
    """The places of ``count`` images, ``size`` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
