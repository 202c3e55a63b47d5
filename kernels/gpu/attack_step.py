"""The attack step as Triton kernels; ``ironmoe.kernels.attack_step`` says what they compute. They
compute in float32.

A block of pixels has no shape suffix. x is the center, y the point after the step, z the point in
ball and box; ``at`` is where pixels lie in memory, ``real`` which of them exist.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ironmoe.kernels.gpu.floats import KEEP_NAN, TINY
from ironmoe.kernels.gpu.launch import cdiv, launch, next_power_of_2
from ironmoe.kernels.types import MAX_PROJECTION_ROUNDS


@triton.jit
def linf_step_kernel(
    point,
    grad,
    low,
    high,
    alpha,
    moved,
    image,
    pixels,
    blocks,
    BLOCK: tl.constexpr,
    WRITES_IMAGE: tl.constexpr,
):
    """A program moves one block of the pixels of one example."""
    example = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = example.to(tl.int64) * pixels + pixel
    real = pixel < pixels

    slope = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    # the sign of NaN is 0, as in torch
    sign = tl.where(slope > 0, 1.0, 0.0) - tl.where(slope < 0, 1.0, 0.0)
    y = tl.load(point + at, mask=real, other=0.0) + tl.load(alpha + example).to(tl.float32) * sign
    z = tl.clamp(
        y,
        tl.load(low + at, mask=real, other=0.0),
        tl.load(high + at, mask=real, other=0.0),
        propagate_nan=KEEP_NAN,
    )

    tl.store(moved + at, z, mask=real)
    if WRITES_IMAGE:
        tl.store(image + at, z.to(image.dtype.element_ty), mask=real)


@triton.jit
def _load_delta(point, grad, center, at, real, inverse, rate, lowest):
    """(x, y − x) of some pixels. Past the end x is ``lowest`` and y − x is 0."""
    x = tl.load(center + at, mask=real, other=lowest)
    slope = tl.load(grad + at, mask=real, other=0.0).to(tl.float32) * inverse
    return x, tl.load(point + at, mask=real, other=lowest) + rate * slope - x


@triton.jit
def l2_step_kernel(
    point,
    grad,
    center,
    eps,
    alpha,
    moved,
    image,
    pixels,
    lowest,
    highest,
    MAX_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITES_IMAGE: tl.constexpr,
):
    """A program moves one example. y is computed again in every pass over the pixels, which is
    cheaper than storing it."""
    example = tl.program_id(0)
    first = example.to(tl.int64) * pixels
    pixel = tl.arange(0, BLOCK)

    # The norm of the gradient. It is divided by its largest entry first, for squares may underflow.
    peaks = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        slope = tl.load(grad + first + start + pixel, mask=start + pixel < pixels, other=0.0).to(
            tl.float32
        )
        peaks = tl.maximum(peaks, tl.abs(slope))
    inverse = tl.div_rn(1.0, tl.maximum(tl.max(peaks, 0), TINY))
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        slope = tl.load(grad + first + start + pixel, mask=start + pixel < pixels, other=0.0).to(
            tl.float32
        )
        squares += slope * inverse * (slope * inverse)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), 1e-12, propagate_nan=KEEP_NAN)
    rate = tl.div_rn(tl.load(alpha + example).to(tl.float32), norm)

    # The scale s of the projection rises from 0: the first round clips only pixels without room,
    # every further round those that the s before it clips.
    radius = tl.load(eps + example).to(tl.float32)
    before = tl.full([], -1.0, tl.float32)
    scale = tl.full([], 0.0, tl.float32)
    rounds = 0
    while (scale > before) & (rounds < MAX_ROUNDS):
        spent = tl.zeros([BLOCK], tl.float32)
        free = tl.zeros([BLOCK], tl.float32)
        for start in range(0, pixels, BLOCK):
            at, real = first + start + pixel, start + pixel < pixels
            x, delta = _load_delta(
                point, grad, center, at, real, inverse=inverse, rate=rate, lowest=lowest
            )
            room = tl.where(delta > 0, highest - x, x - lowest)
            clipped = scale * tl.abs(delta) >= room
            spent += tl.where(clipped, room * room, 0.0)
            free += tl.where(clipped, 0.0, delta * delta)
        left = tl.maximum(radius * radius - tl.sum(spent, 0), 0.0)
        larger = tl.sqrt_rn(tl.div_rn(left, tl.maximum(tl.sum(free, 0), 1e-30)))
        before = scale
        scale = tl.maximum(tl.minimum(larger, 1.0), scale)
        rounds += 1

    for start in range(0, pixels, BLOCK):
        at, real = first + start + pixel, start + pixel < pixels
        x, delta = _load_delta(
            point, grad, center, at, real, inverse=inverse, rate=rate, lowest=lowest
        )
        z = tl.clamp(x + scale * delta, lowest, highest, propagate_nan=KEEP_NAN)
        tl.store(moved + at, z, mask=real)
        if WRITES_IMAGE:
            tl.store(image + at, z.to(image.dtype.element_ty), mask=real)


def launch_linf_step(
    point: Tensor,
    grad: Tensor,
    low: Tensor,
    high: Tensor,
    alpha: Tensor,
    *,
    moved: Tensor,
    image: Tensor,
) -> None:
    """Fill ``moved`` (B, …) and, unless it is empty, ``image``."""
    if point.numel() == 0:
        return

    pixels = point[0].numel()
    block = min(1024, next_power_of_2(pixels))
    blocks = cdiv(pixels, block)
    launch(
        linf_step_kernel,
        len(point) * blocks,
        num_warps=4,
        **_contiguous(point=point, grad=grad, low=low, high=high, alpha=alpha),
        moved=moved,
        image=image,
        pixels=pixels,
        blocks=blocks,
        BLOCK=block,
        WRITES_IMAGE=image.numel() > 0,
    )


def launch_l2_step(
    point: Tensor,
    grad: Tensor,
    center: Tensor,
    eps: Tensor,
    bounds: tuple[float, float],
    alpha: Tensor,
    *,
    moved: Tensor,
    image: Tensor,
) -> None:
    """Fill ``moved`` (B, …) and, unless it is empty, ``image``; bounds: lowest, highest pixel."""
    if point.numel() == 0:
        return

    lowest, highest = bounds
    pixels = point[0].numel()
    launch(
        l2_step_kernel,
        len(point),
        num_warps=8,
        **_contiguous(point=point, grad=grad, center=center, eps=eps, alpha=alpha),
        moved=moved,
        image=image,
        pixels=pixels,
        lowest=lowest,
        highest=highest,
        MAX_ROUNDS=MAX_PROJECTION_ROUNDS,
        BLOCK=min(4096, next_power_of_2(pixels)),
        WRITES_IMAGE=image.numel() > 0,
    )


def _contiguous(**tensors: Tensor) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
