"""A kernel that is wrong on purpose: its programs write rows of each other."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS = 8, 16


def rows_kernel(out, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr):
    """Program p writes ROWS rows from row ``step`` · p on."""
    first = tl.program_id(0) * step
    values_RC = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    if DESCRIBED:
        out.store([first, 0], values_RC)
    else:
        at_RC = (first + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(out + at_RC, values_RC)


def write(through_a_descriptor: bool, programs: int, step: int) -> torch.Tensor:
    """The rows that ``programs`` programs write, each ``step`` rows after the one before."""
    out = torch.zeros(programs * ROWS, COLUMNS)
    described = TensorDescriptor.from_tensor(out, [ROWS, COLUMNS]) if through_a_descriptor else out
    triton.jit(rows_kernel)[(programs,)](
        described, step, ROWS=ROWS, COLUMNS=COLUMNS, DESCRIBED=through_a_descriptor
    )
    return out
