"""The expert under torch.func: grad, vjp, vmap and their nestings.

``_Opaque`` runs a function of plain tensors; its pullback is a function of the same kind, so
derivatives of any order follow. vmap folds the batch into the tokens, which are independent of each
other; where weights are mapped over, or their gradients asked for one by one (per-sample
gradients), it runs the batch in a loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from ironmoe.kernels.route import transformed
from ironmoe.kernels.types import Routing


def takes_folding() -> bool:
    """Whether torch.func is at work, in reverse mode or vmap. Forward mode runs through plain torch
    operations instead."""
    if torch.compiler.is_compiling() or not transformed():
        return False
    kinds = {interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
    if TransformType.Jvp in kinds and TransformType.Vmap in kinds:
        raise NotImplementedError(
            "expert_mlp has no forward mode under vmap (torch.func.jacfwd, torch.func.hessian): "
            "use jacrev, or jvp without vmap"
        )
    return TransformType.Jvp not in kinds


def by_folding(
    layer: Callable[..., Tensor],
    inputs: tuple[Tensor | None, ...],
    experts: Tensor,
    activation: str,
    recompute: bool,
    precision: str,
) -> Tensor:
    """``layer`` (``expert_mlp``) on ``inputs`` = (x, gates, w_in, w_out, b_in, b_out)."""
    (y,) = _Opaque.apply(_Layer(layer, activation, recompute, precision), *inputs, experts)
    return y


class _Function(Protocol):
    """Of its arguments and outputs, which have tokens as their first axis."""

    token_arguments: tuple[bool, ...]
    token_outputs: tuple[bool, ...]

    def __call__(self, *tensors: Any) -> Any: ...


@dataclass
class _Layer:
    layer: Callable[..., Tensor]
    activation: str
    recompute: bool
    precision: str

    token_arguments: tuple[bool, ...] = (True, True, False, False, False, False, True)
    token_outputs: tuple[bool, ...] = (True,)

    def __call__(
        self,
        x: Tensor,
        gates: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Any,
        b_out: Any,
        experts: Tensor,
    ) -> Any:
        y = self.layer(
            x,
            w_in,
            w_out,
            Routing(gates, experts),
            b_in=b_in,
            b_out=b_out,
            activation=self.activation,
            recompute=self.recompute,
            precision=self.precision,
        )
        return (y,)


class _Pullback:
    """(arguments of f, cotangents of its outputs) → gradients of the arguments ``wanted``."""

    def __init__(self, f: _Function, wanted: list[int]) -> None:
        self.f, self.wanted = f, wanted
        self.token_arguments = f.token_arguments + f.token_outputs
        self.token_outputs = tuple(f.token_arguments[i] for i in wanted)

    def __call__(self, *tensors: Any) -> Any:
        recorded = torch.is_grad_enabled()  # then this call is inside another pullback
        count = len(self.f.token_arguments)
        with torch.enable_grad():
            arguments = [_own(t) if i in self.wanted else t for i, t in enumerate(tensors[:count])]
            outputs = self.f(*arguments)
        leaves = [arguments[i] for i in self.wanted]
        return torch.autograd.grad(
            outputs, leaves, tensors[count:], create_graph=recorded, materialize_grads=True
        )


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(f: _Function, *tensors: Any) -> Any:
        return f(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.f, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found = dict(
            zip(wanted, _Opaque.apply(_Pullback(ctx.f, wanted), *tensors, *cotangents), strict=True)
        )
        return None, *(found.get(i) for i in range(len(tensors)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], f: _Function, *tensors: Any) -> Any:
        dims = in_dims[1:]
        rows = zip(tensors, dims, f.token_arguments, strict=True)
        if all(f.token_outputs) and all(tokens or dim is None for _, dim, tokens in rows):
            folded = [
                _fold(t, dim, info.batch_size) if tokens and t is not None else t
                for t, dim, tokens in zip(tensors, dims, f.token_arguments, strict=True)
            ]
            outputs = _Opaque.apply(f, *folded)
            return tuple(out.unflatten(0, (info.batch_size, -1)) for out in outputs), (0,) * len(
                outputs
            )
        each = [
            _Opaque.apply(
                f,
                *(
                    t if dim is None else t.select(dim, i)
                    for t, dim in zip(tensors, dims, strict=True)
                ),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(outs) for outs in zip(*each, strict=True)), (0,) * len(
            f.token_outputs
        )


def _own(tensor: Tensor) -> Tensor:
    """The same values, a variable of their own: an argument may depend on another one, which must
    not be followed here."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _fold(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """(T, …) for each of the batch → (batch · T, …)."""
    batched = (
        tensor.unsqueeze(0).expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    )
    return batched.flatten(0, 1)
