"""What sizes, tokens and the tensors of experts must be: the errors that name what is not so."""

import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels.route import autocast_dtype, holds_its_numbers


def check_whole(**counts: Any) -> None:
    """TypeError: one of the counts is no whole number. True and False are none."""
    for name, count in counts.items():
        with suppress(TypeError):
            operator.index(count)
            if not isinstance(count, bool):
                continue
        raise TypeError(f"{name} must be a whole number, got {count!r}")


def check_counts(least: int = 1, **counts: Any) -> None:
    """TypeError, ValueError: one of the counts is no whole number, or below ``least``."""
    check_whole(**counts)
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")


def check_module(model: Any) -> None:
    """TypeError: the model is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def check_float_dtype(dtype: Any, name: str = "dtype") -> None:
    """TypeError, ValueError: it is no dtype of torch, or not one of floats. None is torch's
    default."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be a float dtype or None, got {dtype}")


def check_floats(x: Any, shape: str, name: str = "x") -> None:
    """TypeError unless it is a tensor of a float dtype; ``shape`` says the one that it should
    have."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return
    is_tensor = isinstance(x, Tensor)
    got = f"{x.dtype} of shape {tuple(x.shape)}" if is_tensor else type(x).__name__
    raise TypeError(f"{name} must be a float tensor {shape}, got {got}")


def check_tokens(x: Any, dim: int) -> None:
    """TypeError, ValueError: x is no float tensor (…, dim)."""
    check_floats(x, f"(…, {dim})")
    if not x.ndim or x.shape[-1] != dim:
        raise ValueError(f"x must have {dim} features on its last axis, got shape {tuple(x.shape)}")


def check_device(x: Tensor, weight: Tensor) -> None:
    """ValueError unless x lies where the weights of its layer lie."""
    if x.device != weight.device:
        raise ValueError(
            f"x must be on {weight.device} like the weights of the layer, got {x.device}: use "
            f"x.to({str(weight.device)!r}) or layer.to({str(x.device)!r})"
        )


def check_like_weights(x: Tensor, weight: Tensor) -> None:
    """ValueError unless x has the device of its layer's weights and, outside autocast, their
    dtype."""
    check_device(x, weight)
    if x.dtype != weight.dtype and weight.is_floating_point() and autocast_dtype(x) is None:
        raise ValueError(
            f"x must be {weight.dtype} like the weights of the layer, got {x.dtype}: use "
            f"x.to({weight.dtype}) or layer.to({x.dtype})"
        )


def check_experts(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_name: str, bias_name: str
) -> None:
    """ValueError that names the argument which does not fit: x must be (R, D), weight (E, N, D) and
    bias (E, N), of one dtype and on one device."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be a float matrix of rows (·, D), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if weight.ndim != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"{weight_name} must have shape (E, ·, {x.shape[1]}) to match x, got "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"{bias_name} must have shape {tuple(weight.shape[:2])} to match {weight_name}, got "
            f"{tuple(bias.shape)}"
        )
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None:
            check_like(x, tensor, name)


def check_like(x: Tensor, tensor: Tensor, name: str) -> None:
    """ValueError unless the tensor of this name is of the dtype of x, lies on its device and holds
    numbers that a kernel can read."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
        )
    if not holds_its_numbers(tensor):
        raise ValueError(
            f"{name} must be a dense tensor with numbers of its dtype in its own memory, got a "
            f"{type(tensor).__name__} ({tensor.layout}). Pass what it stands for: a quantised "
            "weight dequantised, the local part of a DTensor"
        )
