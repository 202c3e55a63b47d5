"""Which way a call goes.

Eager CPU tensors walk over tiles of rows (``tiles``). CUDA tensors, traced and fake ones go through
the registered operators ``ironmoe::…``, whose body is Triton where there is a GPU (or its
interpreter: TRITON_INTERPRET=1) and the torch twin elsewhere. Where only operations that others
know may be seen, there are plain ones: ``onnx_graph`` for ONNX, the tiles for tools that count
through torch.jit's tracer.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
import torch.autograd.forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.jit._trace import ONNXTracedModule, is_tracing

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("ieee", "tf32")


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_operators(tensor: Tensor) -> bool:
    """Whether a call on this tensor goes through the registered operators."""
    if recorded_by_jit() or onnx_exporting():
        return False
    return (
        torch.compiler.is_compiling()
        or tensor.device.type != "cpu"
        or isinstance(tensor, FakeTensor)
        or takes_triton(tensor)
    )


def takes_triton(tensor: Tensor) -> bool:
    """Whether an operator on this tensor runs as a Triton kernel. float64 takes the torch twin."""
    on_device = tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreting())
    return (
        on_device
        and (tensor.dtype in TRITON_DTYPES or not tensor.is_floating_point())
        and _has_triton()
    )


def holds_its_numbers(tensor: Tensor) -> bool:
    """Whether the memory of this tensor holds the numbers that its dtype promises. Not so for a
    subclass that answers operations itself: quantised weights say bfloat16 and hold int8, a
    DTensor holds a part."""
    kind = type(tensor)
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return tensor.layout is torch.strided and (
        not own or isinstance(tensor, FakeTensor | FunctionalTensor)
    )


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, …) is at work."""
    return torch._C._are_functorch_transforms_active()


def may_look(tensor: Tensor) -> bool:
    """Whether values can be read at no cost: on CPU, outside tracing and transforms."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
        and not transformed()
    )


def exporting() -> bool:
    """Whether torch.export traces: its graph must hold for every size that its caller asked for."""
    return torch.compiler.is_exporting()


def onnx_exporting() -> bool:
    """Whether ``torch.onnx.export`` traces, through torch.export."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def recorded_by_jit() -> bool:
    """Whether a tool looks at the operations of one run through torch.jit's tracer, as fvcore does
    to count them.

    Raises:
        RuntimeError: it is torch.jit.trace or the old exporter to ONNX, whose program would repeat
            the routing of its example on every input.
    """
    if torch.compiler.is_compiling() or not is_tracing():
        return False
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export(…, dynamo=False) would keep the routing of its example: use "
            "torch.onnx.export(…, dynamo=True)"
        )
    frame = sys._getframe()
    while frame.f_code is not ONNXTracedModule.forward.__code__:
        if frame.f_back is None:
            raise RuntimeError(
                "torch.jit.trace would keep the routing of its example: use "
                "torch.export.export(model, args)"
            )
        frame = frame.f_back
    return True


def recomputing() -> bool:
    """Whether this code runs inside a backward pass: activation checkpointing runs the forward of a
    module again there, which must not count as another call of it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def forward_mode() -> bool:
    """Whether forward-mode differentiation is at work (``torch.autograd.forward_ad``): the
    operators have no rule for it."""
    return torch.autograd.forward_ad._current_level >= 0


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would compute in on this device; None if it is off, or unknown there (meta)."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast is off on the device of this tensor."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def check_precision(precision: str) -> None:
    """ValueError unless it is one that ``tl.dot`` knows."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
