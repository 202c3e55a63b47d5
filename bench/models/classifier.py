"""Somebody else's model as a classifier of pixels: its channels, its normalization, its dtype, and
the logits among its outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.bench.models.outputs import logits_of
from ironmoe.moe.checkpoints.errors import CheckpointError


class Classifier(nn.Module):
    """From pixels (B, C, H, W) float32 in [0, 1] to logits (B, classes) float32.

    It computes (pixels − mean) / std in float32, gives the result to the model in the dtype of the
    model's first weight, and takes the logits from what the model returns. Gradients reach the
    pixels.

    Args:
        model: takes images as its first argument.
        mean, std: one number for each channel of the pixels, in units of the pixel range; None: the
            model takes pixels as they are.
        order: which channel of the pixels the model's first, second, … channel is, such as
            (2, 1, 0) for BGR; None: the same.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.order = None if order is None else list(order)
        self.register_buffer("mean", None)
        self.register_buffer("std", None)
        if mean is not None or std is not None:
            some = mean or std or ()
            self.normalize(mean or [0.0] * len(some), std or [1.0] * len(some))

    def normalize(self, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
        """Take these numbers from now on: one for each channel, or one for however many."""
        device = next((each.device for each in self.model.parameters()), torch.device("cpu"))
        self.mean, self.std = (
            numbers.view(-1, 1, 1) if numbers.ndim else numbers
            for numbers in (
                torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std)
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        inputs = pixels
        if self.mean is not None and self.std is not None:
            self._check_channels(pixels)
            inputs = (inputs - self.mean) / self.std
        if self.order is not None:
            inputs = inputs[:, self.order]

        dtype = dtype_of(self.model)
        inputs = inputs if dtype is None else inputs.to(dtype)
        try:
            logits = logits_of(self.model(inputs))
        except (RuntimeError, NotImplementedError) as error:
            if "'Half'" not in str(error) or pixels.device.type != "cpu":
                raise
            raise CheckpointError(
                f"float16 weights need a GPU here, because torch on a CPU says: {error}; add "
                "dtype=float32 to the model's name, such as hf:FOLDER?dtype=float32"
            ) from error
        return _in_float32(logits)

    def _check_channels(self, pixels: Tensor) -> None:
        """Broadcasting would make three channels of one."""
        assert self.mean is not None
        if self.mean.ndim and pixels.shape[1] != len(self.mean):
            raise CheckpointError(
                f"the model must get images with {len(self.mean)} channels, got {pixels.shape[1]}"
            )

    def extra_repr(self) -> str:
        return "" if self.order is None else f"order={self.order}"


def as_it_is(model: nn.Module) -> nn.Module:
    """A model that takes pixels already: the same module, which from now on returns logits alone,
    in float32.

    Its layers and weights keep their names, so what ``ironmoe train`` saves of it fits the module
    of whoever wrote it. One with weights in half precision becomes a ``Classifier``.
    """
    if dtype_of(model) not in (None, torch.float32):
        return Classifier(model)
    model.register_forward_hook(_only_logits)
    return model


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """What a model computes in, by its first weight; None if it has none."""
    floats = (each.dtype for each in model.parameters() if each.is_floating_point())
    return next(floats, None)


def _only_logits(model: nn.Module, inputs: Any, output: Any) -> Tensor:
    return _in_float32(logits_of(output))


def _in_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.is_floating_point() else logits
