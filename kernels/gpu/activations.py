"""The activations of ``ironmoe.kernels.activations`` inside a kernel: a hidden unit and its derivatives, in float32."""

import triton
import triton.language as tl

# A GPU's plain minimum and maximum take the number where the other one is NaN: a diverged layer would look sound.
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def unit(h, up, ACTIVATION: tl.constexpr):
    """(value, ∂value/∂h, ∂value/∂up); ``up`` counts for gated activations only. What a caller leaves unused is not computed."""
    if ACTIVATION == "clamped_swiglu":  # gpt-oss: alpha 1.702, limit 7
        cut = tl.minimum(h, 7.0, KEEP_NAN)
        sigmoid = tl.sigmoid(1.702 * cut)
        swish = cut * sigmoid
        factor = tl.minimum(tl.maximum(up, -7.0, KEEP_NAN), 7.0, KEEP_NAN) + 1
        slope = tl.where(h <= 7.0, sigmoid + 1.702 * swish * (1 - sigmoid), 0.0)
        return swish * factor, slope * factor, tl.where(tl.abs(up) <= 7.0, swish, 0.0)
    elif ACTIVATION == "swiglu":
        value, slope = elementwise(h, "silu")
        return value * up, slope * up, value
    elif ACTIVATION == "geglu":
        value, slope = elementwise(h, "gelu")
        return value * up, slope * up, value
    else:
        value, slope = elementwise(h, ACTIVATION)
        return value, slope, value


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
        return h * sigmoid, sigmoid + h * sigmoid * tl.sigmoid(-u) * inner  # 1 - sigmoid would cancel, and h · inner is large
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
