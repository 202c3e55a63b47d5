"""Scaled dot-product attention by torch's fused kernels, with derivatives of every order.

The fused kernels have a first derivative and no other: neither a second one nor forward mode. So
the context decides. Forward mode and torch.func take plain operations from the start. In plain
autograd nobody knows beforehand whether the backward pass will be differentiated. There the fused
kernel runs, and its backward pass too, unless it runs under ``create_graph=True``: then it is
written out in plain operations on what was saved, which are differentiable to any order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from ironmoe.kernels.autograd.softmax import softmax
from ironmoe.kernels.route import autocast_dtype, forward_mode, transformed, without_autocast
from ironmoe.moe.routers.masks import for_softmax

aten = torch.ops.aten


def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (B, H, N, D) in the dtype of ``q``, to the keys that are True
    in the mask. A row without such a key attends to all of its keys. Differentiable to any order,
    in reverse and in forward mode.

    On CPU the fused kernel's backward pass takes up to 7 times as long in bfloat16 as in float32
    (torch 2.13, 16 tokens), so float32 it is there.
    """
    dtype = q_BHND.dtype
    mask_B11N = None if mask_BN is None else for_softmax(mask_BN)[:, None, None]
    if q_BHND.device.type != "cpu" or dtype.itemsize >= 4:
        return _by_context(q_BHND, k_BHND, v_BHND, mask_B11N)
    with torch.autocast("cpu", enabled=False):
        wide = q_BHND.float(), k_BHND.float(), v_BHND.float()
        return _by_context(*wide, mask_B11N).to(dtype)


def _by_context(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # whoever records operations, to run, export or count them, gets the one that all of them know
    if torch.compiler.is_compiling() or is_tracing():
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if transformed() or forward_mode():
        return _plainly(q, k, v, mask)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    kernel = _cpu_kernel(q, k, v, mask)
    if kernel is SDPBackend.MATH:  # plain operations, by torch itself
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if kernel is SDPBackend.FLASH_ATTENTION:
        return _CpuKernel.apply(q, k, v, None if mask is None else _added(mask, q))
    q_in, k_in, v_in = _Before.apply(q, k, v)
    fused = scaled_dot_product_attention(q_in, k_in, v_in, attn_mask=mask)
    return _After.apply(fused, q, k, v, mask)


def _plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in operations that have every kind of derivative, computed in at least float32."""
    with without_autocast(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        return (_weights(q.to(wide), k.to(wide), mask) @ v.to(wide)).to(q.dtype)


def _plainly_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) from the gradient of the result, as ``_plainly``."""
    with without_autocast(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        dy, q_wide, k_wide, v_wide = (t.to(wide) for t in (dy, q, k, v))
        weights = _weights(q_wide, k_wide, mask)
        d_weights = dy @ v_wide.mT
        mean = (weights * d_weights).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - mean) * _scale(q)
        grads = d_scores @ k_wide, d_scores.mT @ q_wide, weights.mT @ dy
        return tuple(grad.to(t.dtype) for grad, t in zip(grads, (q, k, v), strict=True))


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N, M) the share of each of the M keys."""
    scores = q @ k.mT * _scale(q)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return softmax(scores, -1)


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as the CPU kernel takes it: what is added to the scores."""
    nothing = torch.zeros((), dtype=like.dtype, device=like.device)
    return nothing.where(mask, float("-inf"))


def _cpu_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> SDPBackend | None:
    """What torch would run on these CPU tensors, in their own dtype; None where that is not
    known."""
    # a subclass of Tensor may answer in a way of its own
    if q.device.type != "cpu" or any(type(t) is not Tensor for t in (q, k, v)):
        return None
    if autocast_dtype(q) is not None:  # torch would cast first
        return None
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
    known = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    return next((kernel for kernel in known if kernel.value == choice), None)


class _CpuKernel(torch.autograd.Function):
    """torch's fused kernel on CPU, which keeps what torch itself keeps for it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        y, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added)
        ctx.save_for_backward(q, k, v, added, y, logsumexp)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, added, y, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():
            mask = None if added is None else added == 0
            return *_plainly_backward(dy, q, k, v, mask), None
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, logsumexp, dropout_p=0.0, is_causal=False, attn_mask=added
        )
        return *grads, None


class _Before(torch.autograd.Function):
    """Stands before any fused kernel, and ``_After`` behind it. Under ``create_graph=True`` what
    the kernel's own backward pass says is left out, and ``_After`` gives the gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, None) if torch.is_grad_enabled() else grads


class _After(torch.autograd.Function):
    """(y of the fused kernel, its inputs) → y. The inputs that it keeps are those that the kernel
    keeps, too: the same memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        ctx.save_for_backward(q, k, v, mask)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return dy, None, None, None, None
        q, k, v, mask = ctx.saved_tensors
        # zeros: not every kernel takes the absence of a gradient
        return torch.zeros_like(dy), *_plainly_backward(dy, q, k, v, mask), None
