"""Layer norm by torch's fused kernel, with derivatives of every order.

torch's own formulas for a second derivative of the kernel, and for forward mode, cannot be
differentiated again: what comes out is wrong, and nothing says so. So the context decides, as in
``ironmoe.moe.vit.attend``. Forward mode and torch.func take plain operations from the start. In
plain autograd the kernel runs, and its backward pass too, unless it runs under
``create_graph=True``: then it is written out in plain operations on what was saved, which are
differentiable to any order.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.overrides import has_torch_function

from ironmoe.kernels.autograd.demand import demanded
from ironmoe.kernels.route import autocast_dtype, forward_mode, transformed

aten = torch.ops.aten


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm``, to the last bit of its values and first gradients; differentiable to any
    order, in reverse and in forward mode."""

    def forward(self, input: Tensor) -> Tensor:
        """x (…, normalized_shape) → the same shape and dtype.

        Raises:
            RuntimeError: x does not end in ``normalized_shape``, as torch says it.
        """
        weight, bias, shape = self.weight, self.bias, self.normalized_shape
        # whoever records operations, to run, export or count them, gets the one that all of them
        # know; a subclass of Tensor may answer to it in a way of its own
        recorded = torch.compiler.is_compiling() or is_tracing()
        if recorded or has_torch_function((input, weight, bias)):
            return super().forward(input)
        plainly = transformed() or forward_mode()
        fits = input.shape[-len(shape) :] == shape
        if not fits or not (plainly or torch.is_grad_enabled()):  # an error, or nothing to record
            return nn.functional.layer_norm(input, shape, weight, bias, self.eps)

        x, weight, bias = _as_autocast_does(input, weight, bias)
        if plainly:
            return _plainly(x, weight, bias, len(shape), self.eps)
        y: Tensor = _Kernel.apply(x, weight, bias, shape, self.eps)
        return y


def _as_autocast_does(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """Under autocast layer norm is computed in float32, but on CPU in the dtype of x."""
    tensors = (x, *parameters)
    if x.device.type == "cpu" or autocast_dtype(x) is None:
        return tensors
    return tuple(t if t is None or t.dtype.itemsize >= 4 else t.float() for t in tensors)


def _plainly(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> Tensor:
    """The layer in operations that have every kind of derivative, computed in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y, _ = _normalised(x.to(wide), axes, eps)
    y = y if weight is None else y * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype)


def _normalised(x: Tensor, axes: int, eps: float) -> tuple[Tensor, Tensor]:
    """(x with mean 0 and variance 1 over its last axes, 1 / standard deviation)."""
    over = tuple(range(-axes, 0))
    centred = x - x.mean(over, keepdim=True)
    rstd = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _plainly_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db) from the gradient of the result, in operations that can be differentiated, and
    in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dy = dy.to(wide)
    normed, rstd = _normalised(x.to(wide), axes, eps)

    d_normed = dy if weight is None else dy * weight.to(wide)
    over = tuple(range(-axes, 0))
    mean = d_normed.mean(over, keepdim=True)
    slope = (d_normed * normed).mean(over, keepdim=True)
    dx = rstd * (d_normed - mean - normed * slope)

    shape = x.shape[x.ndim - axes :]
    return dx, (dy * normed).sum_to_size(shape), dy.sum_to_size(shape)


class _Kernel(torch.autograd.Function):
    """torch's fused kernel, which keeps what torch itself keeps for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape, ctx.eps = shape, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        want = demanded(ctx, (True, weight is not None, bias is not None))
        if not torch.is_grad_enabled():
            grads = aten.native_layer_norm_backward.default(
                dy, x, ctx.shape, mean, rstd, weight, bias, want
            )
            return *grads, None, None

        grads = _plainly_backward(dy, x, weight, len(ctx.shape), ctx.eps)
        found = (
            grad.to(t.dtype) if wanted else None
            for grad, t, wanted in zip(grads, (x, weight, bias), want, strict=True)
        )
        return *found, None, None
