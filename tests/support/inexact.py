"""A GPU's arithmetic in Triton's interpreter.

A GPU has no exact exponential, and by default no exact division. Bounds that hold in the
interpreter, where numpy rounds almost every result correctly, need not hold there. Under
``inexact`` the interpreter errs as much as PTX may, always in the same direction; a bound that
holds in both directions does not suppose exactness.
"""

from contextlib import contextmanager
from copy import copy
from importlib import import_module

import numpy as np
import pytest

LOG2_E = np.float32(1.4426950408889634)
# ex2.approx: at most this much of the result; div.full and erff: 2 units in its last place
RELATIVE = 2.0**-22
OF_LOG = 2.0**-23  # logf, which is a polynomial: one unit


@contextmanager
def inexact(direction):
    """exp, exp2, log, erf and ``/`` of float32 are too large (direction 1) or too small (-1)."""
    builder = import_module("triton.runtime.interpreter").interpreter_builder

    def changed(operand, change):
        if operand.data.dtype != np.float32:
            return operand
        operand = copy(operand)
        with np.errstate(all="ignore"):
            operand.data = change(operand.data).astype(np.float32)
        return operand

    def off(exact, error=RELATIVE):
        factor = np.float32(1 + direction * error)
        return lambda *operands: changed(exact(*operands), lambda data: data * factor)

    exp2 = off(builder.create_exp2)

    def exp(x):  # Triton takes it for ex2(x · log2(e)), and the product is rounded
        return exp2(changed(x, lambda data: data * LOG2_E))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_exp", exp)
        patch.setattr(builder, "create_log", off(builder.create_log, OF_LOG))
        patch.setattr(builder, "create_exp2", exp2)
        patch.setattr(builder, "create_erf", off(builder.create_erf))
        patch.setattr(builder, "create_fdiv", off(builder.create_fdiv))
        yield
