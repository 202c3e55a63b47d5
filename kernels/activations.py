"""Activations of an expert: value and derivative, plain and gated.

A gated unit reads 2F columns and gives act(gate) · up, F columns. They are [gate | up], as most
Hugging Face models store them, or gate, up, gate, up …, as gpt-oss does. Some units cut both first,
gate ≤ limit and |up| ≤ limit: DeepSeek-V4's limited SwiGLU is SwiGLU behind the cuts, gpt-oss's
clamped SwiGLU is gate · sigmoid(1.702 · gate) · (up + 1). Both directions use differentiable aten
operators, so derivatives of any order follow.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """``value(h)`` and ``backward(grad, h)``; the other fields describe the unit.

    gated: h is [gate | up].
    limit: gate is cut from above, up on both sides.
    offset: added to up after the cut.
    interleaved: the columns of h alternate gate, up, gate, up … instead, and so do those of its
        gradient.
    """

    elementwise: Callable[[Tensor], Tensor]
    elementwise_backward: Callable[[Tensor, Tensor], Tensor]
    gated: bool
    limit: float | None = None
    offset: float = 0.0
    interleaved: bool = False

    def value(self, hidden: Tensor) -> Tensor:
        """(R, F) or (R, 2F) pre-activations to (R, F)."""
        if not self.gated:
            return self.elementwise(hidden)
        gate, factor = self._factors(*self._halves(hidden))
        if _records(hidden):
            return self.elementwise(gate) * factor
        return self.elementwise(gate).mul_(factor)

    def backward(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient with respect to ``hidden``, of its shape, from the gradient (R, F) with respect
        to the value."""
        if not self.gated:
            return self.elementwise_backward(grad, hidden)
        gate, up = self._halves(hidden)
        cut_gate, factor = self._factors(gate, up)
        if _records(grad, hidden):
            d_gate, d_up = (
                self.elementwise_backward(grad * factor, cut_gate),
                grad * self.elementwise(cut_gate),
            )
            # the limit itself is not cut: torch.clamp has the same slope there
            if self.limit is not None:
                d_gate, d_up = (
                    d_gate.where(gate <= self.limit, 0),
                    d_up.where(up.abs() <= self.limit, 0),
                )
            return (
                torch.stack([d_gate, d_up], dim=-1).flatten(-2)
                if self.interleaved
                else torch.cat([d_gate, d_up], dim=-1)
            )
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = self._halves(d_hidden)
        d_gate.copy_(self.elementwise_backward(torch.mul(grad, factor, out=d_up), cut_gate))
        torch.mul(grad, self.elementwise(cut_gate), out=d_up)
        if self.limit is not None:
            d_gate.masked_fill_(~(gate <= self.limit), 0)
            d_up.masked_fill_(~(up.abs() <= self.limit), 0)
        return d_hidden

    def _halves(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the gate and the up columns."""
        if self.interleaved:
            return hidden[..., ::2], hidden[..., 1::2]
        gate, up = hidden.chunk(2, dim=-1)
        return gate, up

    def _factors(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """What the elementwise function takes, and what its value is multiplied by."""
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + self.offset


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


def _quick_gelu(h: Tensor) -> Tensor:
    return h * (1.702 * h).sigmoid()


def _quick_gelu_backward(grad: Tensor, h: Tensor) -> Tensor:
    sigmoid = (1.702 * h).sigmoid()
    return grad * (sigmoid * (1 + 1.702 * h * (1 - sigmoid)))


_CLAMPED_SWIGLU = Activation(_quick_gelu, _quick_gelu_backward, gated=True, limit=7.0, offset=1.0)
ACTIVATIONS = {
    "gelu": Activation(_gelu, _gelu_backward, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward, gated=False),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward, gated=False),  # CLIP's
    "relu": Activation(aten.relu, _relu_backward, gated=False),
    "relu2": Activation(_relu2, _relu2_backward, gated=False),
    "silu": Activation(aten.silu, _silu_backward, gated=False),
    "swiglu": Activation(aten.silu, _silu_backward, gated=True),
    "geglu": Activation(_gelu, _gelu_backward, gated=True),
    "geglu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward, gated=True),
    "clamped_swiglu": _CLAMPED_SWIGLU,
    "clamped_swiglu_interleaved": _CLAMPED_SWIGLU._replace(interleaved=True),
    "limited_swiglu": Activation(aten.silu, _silu_backward, gated=True, limit=10.0),
}
"""name → what an expert computes under it, as ``activation`` of ``expert_mlp``."""

GATED_ACTIVATIONS = frozenset(name for name, activation in ACTIVATIONS.items() if activation.gated)
INTERLEAVED_ACTIVATIONS = frozenset(
    name for name, activation in ACTIVATIONS.items() if activation.interleaved
)


def get_activation(name: str) -> Activation:
    """The activation called ``name``. ValueError names the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
