"""The layer by its definition: every expert on every token, weighted by a (T, E) matrix. Shares no
code with the package."""

import math

import torch
from torch import Tensor


def activation(name: str, hidden: Tensor) -> Tensor:
    if name == "clamped_swiglu_interleaved":  # gpt-oss: gate and up in turns
        return activation(
            "clamped_swiglu", torch.cat(hidden.unflatten(-1, (-1, 2)).unbind(-1), dim=-1)
        )
    if name in ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "limited_swiglu"):
        half = hidden.shape[-1] // 2
        gate, up = hidden[..., :half], hidden[..., half:]
        if name == "clamped_swiglu":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return (up + 1) * (gate * torch.sigmoid(1.702 * gate))
        if name == "limited_swiglu":  # DeepSeek-V4
            gate, up = gate.clamp(max=10.0), up.clamp(-10.0, 10.0)
        return up * activation({"geglu": "gelu", "geglu_tanh": "gelu_tanh"}.get(name, "silu"), gate)
    return {
        "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
        "gelu_tanh": lambda h: (
            h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        ),
        "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
        "relu": lambda h: h.relu(),
        "relu2": lambda h: h.relu() ** 2,
        "silu": lambda h: h * torch.sigmoid(h),
    }[name](hidden)


def score(name: str, logits: Tensor) -> Tensor:
    """A router's score along the last axis."""
    return {
        "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
        "sigmoid": lambda z: 1 / (1 + (-z).exp()),
        "sqrtsoftplus": lambda z: torch.log1p(z.exp()).sqrt(),
    }[name](logits)


def dense_moe(x, w_in, w_out, gates, experts, b_in=None, b_out=None, act="gelu") -> Tensor:
    num_experts = w_in.shape[0]
    hidden = torch.einsum("td,efd->tef", x, w_in)
    if b_in is not None:
        hidden = hidden + b_in
    y = torch.einsum("tef,edf->ted", activation(act, hidden), w_out)
    if b_out is not None:
        y = y + b_out
    weights = torch.zeros(len(x), num_experts + 1, dtype=gates.dtype).scatter_add(
        1, experts.long(), gates
    )
    return torch.einsum("te,ted->td", weights[:, :num_experts].to(y.dtype), y)


def layer(tokens, dim, hidden, num_experts, dtype=torch.float64, gated=False, bias=True):
    """Leaves x, w_in, w_out, b_in, b_out."""
    wide = 2 * hidden if gated else hidden
    shapes = {
        "x": (tokens, dim),
        "w_in": (num_experts, wide, dim),
        "w_out": (num_experts, dim, hidden),
    }
    if bias:
        shapes |= {"b_in": (num_experts, wide), "b_out": (num_experts, dim)}
    leaves = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    leaves["w_in"] *= dim**-0.5
    leaves["w_out"] *= hidden**-0.5
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
