"""The activations of ``ironmoe.kernels.activations`` inside a kernel: a hidden unit and its
derivatives, in float32."""

from typing import NamedTuple

import triton
import triton.language as tl

from ironmoe.kernels.activations import ACTIVATIONS
from ironmoe.kernels.gpu.floats import KEEP_NAN

CLAMPED_LIMIT = tl.constexpr(ACTIVATIONS["clamped_swiglu"].limit)  # gpt-oss
LIMITED_LIMIT = tl.constexpr(ACTIVATIONS["limited_swiglu"].limit)  # DeepSeek-V4


class Unit(NamedTuple):
    """What a kernel does to H; a constant of the compiler.

    gated: gate and up are halves of its columns; interleaved: they take turns. Neither: H has one
    column a unit.
    """

    activation: str
    gated: bool
    interleaved: bool

    @property
    def halves(self) -> int:
        """Into how many halves the columns of H fall."""
        return 2 if self.gated else 1


def unit_of(activation: str) -> Unit:
    """The unit of a name in ``ACTIVATIONS``, or of "none": H as it is."""
    if activation == "none":
        return Unit("none", gated=False, interleaved=False)
    entry = ACTIVATIONS[activation]
    return Unit(activation, entry.gated and not entry.interleaved, entry.interleaved)


@triton.jit
def unit(h, up, ACTIVATION: tl.constexpr):
    """(value, ∂value/∂h, ∂value/∂up); ``up`` counts for gated activations only. What a caller
    leaves unused is not computed."""
    if ACTIVATION == "clamped_swiglu" or ACTIVATION == "clamped_swiglu_interleaved":
        cut, factor = clamp(h, up, CLAMPED_LIMIT)
        value, slope = elementwise(cut, "quick_gelu")
        return with_cuts(h, up, value, slope, factor + 1, CLAMPED_LIMIT)
    elif ACTIVATION == "limited_swiglu":
        cut, factor = clamp(h, up, LIMITED_LIMIT)
        value, slope = elementwise(cut, "silu")
        return with_cuts(h, up, value, slope, factor, LIMITED_LIMIT)
    elif ACTIVATION == "swiglu":
        value, slope = elementwise(h, "silu")
        return value * up, slope * up, value
    elif ACTIVATION == "geglu":
        value, slope = elementwise(h, "gelu")
        return value * up, slope * up, value
    elif ACTIVATION == "geglu_tanh":
        value, slope = elementwise(h, "gelu_tanh")
        return value * up, slope * up, value
    else:
        value, slope = elementwise(h, ACTIVATION)
        return value, slope, value


@triton.jit
def clamp(h, up, LIMIT: tl.constexpr):
    """The gate cut from above, up on both sides."""
    cut_up = tl.minimum(tl.maximum(up, -LIMIT, KEEP_NAN), LIMIT, KEEP_NAN)
    return tl.minimum(h, LIMIT, KEEP_NAN), cut_up


@triton.jit
def with_cuts(h, up, value, slope, factor, LIMIT: tl.constexpr):
    """``unit`` from the value and the slope at the clamped gate. Slopes are 0 beyond the limit, not
    at it, as torch.clamp's are."""
    return (
        value * factor,
        tl.where(h <= LIMIT, slope * factor, 0.0),
        tl.where(tl.abs(up) <= LIMIT, value, 0.0),
    )


@triton.jit
def elementwise(h, ACTIVATION: tl.constexpr):
    """(act(h), act′(h))."""
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        return h * cdf, cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":  # 0.5 · (1 + tanh(u)) is sigmoid(2u)
        u = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        sigmoid = tl.sigmoid(u)
        inner = 1.5957691216057308 * (1 + 0.134145 * h * h)
        # 1 - sigmoid would cancel, and h · inner is large
        return h * sigmoid, sigmoid + h * sigmoid * tl.sigmoid(-u) * inner
    elif ACTIVATION == "quick_gelu":
        sigmoid = tl.sigmoid(1.702 * h)
        value = h * sigmoid
        return value, sigmoid + 1.702 * value * (1 - sigmoid)
    elif ACTIVATION == "relu":
        return tl.maximum(h, 0.0, KEEP_NAN), tl.where(h > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(h, 0.0, KEEP_NAN)
        return positive * positive, 2 * positive
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(h)
        return h * sigmoid, sigmoid * (1 + h * (1 - sigmoid))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return h, h * 0 + 1
