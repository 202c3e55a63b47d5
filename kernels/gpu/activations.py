"""The activations of ``ironmoe.kernels.activations`` inside a kernel: a hidden unit and its
derivatives, in float32."""

import triton
import triton.language as tl

# A GPU's plain minimum and maximum take the number where the other one is NaN: a diverged layer
# would look sound.
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def unit(h, up, ACTIVATION: tl.constexpr):
    """(value, ∂value/∂h, ∂value/∂up); ``up`` counts for gated activations only. What a caller
    leaves unused is not computed."""
    # gpt-oss: alpha 1.702, limit 7
    if ACTIVATION == "clamped_swiglu" or ACTIVATION == "clamped_swiglu_interleaved":
        cut, factor = clamp(h, up, 7.0)
        value, slope = elementwise(cut, "quick_gelu")
        return with_cuts(h, up, value, slope, factor + 1, 7.0)
    elif ACTIVATION == "limited_swiglu":  # DeepSeek-V4: limit 10
        cut, factor = clamp(h, up, 10.0)
        value, slope = elementwise(cut, "silu")
        return with_cuts(h, up, value, slope, factor, 10.0)
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
    return tl.minimum(h, LIMIT, KEEP_NAN), tl.minimum(
        tl.maximum(up, -LIMIT, KEEP_NAN), LIMIT, KEEP_NAN
    )


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
