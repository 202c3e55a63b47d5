"""Activations of an expert: value and derivative, plain and gated.

A gated unit reads 2F columns, [gate | up] as Hugging Face stores them, and gives act(gate) · up, F columns. gpt-oss's clamped
SwiGLU cuts both first, gate ≤ 7 and |up| ≤ 7, takes gate · sigmoid(1.702 · gate), and multiplies by up + 1.
Both directions use differentiable aten operators, so derivatives of any order follow.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """``value(h)`` and ``backward(grad, h)``; ``gated`` says whether h is [gate | up], ``limit`` where gpt-oss's unit cuts."""

    elementwise: Callable[[Tensor], Tensor]
    elementwise_backward: Callable[[Tensor, Tensor], Tensor]
    gated: bool
    limit: float | None = None

    def value(self, hidden: Tensor) -> Tensor:
        """(R, F) or (R, 2F) pre-activations to (R, F)."""
        if not self.gated:
            return self.elementwise(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
        if _records(hidden):
            return self.elementwise(gate) * up
        return self.elementwise(gate).mul_(up)

    def backward(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient with respect to ``hidden``, of its shape, from the gradient (R, F) with respect to the value."""
        if not self.gated:
            return self.elementwise_backward(grad, hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if self.limit is not None:
            cut_gate, cut_up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
            d_gate = self.elementwise_backward(grad * cut_up, cut_gate) * (gate <= self.limit)
            d_up = grad * self.elementwise(cut_gate) * (up.abs() <= self.limit)
            return torch.cat([d_gate, d_up], dim=-1)
        if _records(grad, hidden):
            return torch.cat([self.elementwise_backward(grad * up, gate), grad * self.elementwise(gate)], dim=-1)
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        d_gate.copy_(self.elementwise_backward(torch.mul(grad, up, out=d_up), gate))
        torch.mul(grad, self.elementwise(gate), out=d_up)
        return d_hidden


def _records(*tensors: Tensor) -> bool:
    """Whether autograd is recording what happens to these, so that nothing may be done in place."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _gelu(h: Tensor) -> Tensor:
    return aten.gelu(h)


def _gelu_backward(grad: Tensor, h: Tensor) -> Tensor:
    return aten.gelu_backward(grad, h)


def _gelu_tanh(h: Tensor) -> Tensor:
    return aten.gelu(h, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, h: Tensor) -> Tensor:
    return aten.gelu_backward(grad, h, approximate="tanh")


def _silu_backward(grad: Tensor, h: Tensor) -> Tensor:
    if _records(grad, h):  # aten's fused form has no derivative of its own
        sigmoid = h.sigmoid()
        return grad * (sigmoid * (1 + h * (1 - sigmoid)))
    return aten.silu_backward(grad, h)


def _relu_backward(grad: Tensor, h: Tensor) -> Tensor:
    return aten.threshold_backward(grad, h, 0)


def _relu2(h: Tensor) -> Tensor:
    return aten.relu(h).square()


def _relu2_backward(grad: Tensor, h: Tensor) -> Tensor:
    return grad * (2 * aten.relu(h))


def _sharp_silu(h: Tensor) -> Tensor:
    return h * (1.702 * h).sigmoid()


def _sharp_silu_backward(grad: Tensor, h: Tensor) -> Tensor:
    sigmoid = (1.702 * h).sigmoid()
    return grad * (sigmoid * (1 + 1.702 * h * (1 - sigmoid)))


ACTIVATIONS = {
    "gelu": Activation(_gelu, _gelu_backward, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward, gated=False),
    "relu": Activation(aten.relu, _relu_backward, gated=False),
    "relu2": Activation(_relu2, _relu2_backward, gated=False),
    "silu": Activation(aten.silu, _silu_backward, gated=False),
    "swiglu": Activation(aten.silu, _silu_backward, gated=True),
    "geglu": Activation(_gelu, _gelu_backward, gated=True),
    "clamped_swiglu": Activation(_sharp_silu, _sharp_silu_backward, gated=True, limit=7.0),
}
GATED_ACTIVATIONS = frozenset(name for name, activation in ACTIVATIONS.items() if activation.gated)


def get_activation(name: str) -> Activation:
    """The activation called ``name``. ValueError names the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
