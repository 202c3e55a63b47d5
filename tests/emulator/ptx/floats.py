"""Instructions on floating-point numbers → Python.

Approximations (ex2, rcp, …) are computed exactly and rounded.
"""

from ptx.emitter import Emitter, unsigned
from ptx.parse import Instruction
from ptx.reports import Fault

EXPRESSIONS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "fma": "fma({}, {}, {})",
    "div": "{} / {}", "neg": "-{}",
    "abs": "np.abs({})", "sqrt": "np.sqrt({})", "ex2": "np.exp2({}.astype(f64))",
    "lg2": "np.log2({}.astype(f64))",
    "rcp": "1 / {}.astype(f64)", "rsqrt": "1 / np.sqrt({}.astype(f64))",
    "tanh": "np.tanh({}.astype(f64))",
    "sin": "np.sin({}.astype(f64))", "cos": "np.cos({}.astype(f64))", "max": "maximum({}, {})",
    "min": "minimum({}, {})",
}  # fmt: skip
PASSES_NAN = {"max": "maximum({}, {}, True)", "min": "minimum({}, {}, True)"}
PAIRS = ("add", "sub", "mul", "fma")  # that exist for two float32 in one register of 64 bits
# For 16-bit numbers, alone or in pairs
HALVES = ("add", "sub", "mul", "fma", "neg", "abs", "max", "min")


def compute(emit: Emitter, instruction: Instruction) -> None:
    """Any of them, in float32 or float64."""
    operation, kind = instruction.parts[0], instruction.parts[-1]
    target, *operands = instruction.operands
    if kind not in ("f32", "f64"):
        of_halves(emit, instruction)
        return
    if operation == "fma" and kind == "f64":
        raise Fault("fma.f64")
    flushed = "ftz" in instruction.parts
    values = [f"flush({value})" if flushed else value for value in emit.reads(operands, kind)]
    expression = f"({_expression(instruction).format(*values)}).astype({kind})"
    expression = expression if operation in ("neg", "abs") else f"one_nan({expression})"
    emit.write(
        target, f"{f'flush({expression})' if flushed else expression}.view({unsigned(kind)})"
    )


def of_halves(emit: Emitter, instruction: Instruction) -> None:
    """Numbers of 16 bits, computed in float32 and rounded once; and pairs of numbers."""
    operation, kind = instruction.parts[0], instruction.parts[-1]
    target, *operands = instruction.operands
    if operation in PAIRS and kind == "f32x2":
        pairs = [f"two_floats({value})" for value in emit.reads(operands, "b64")]
        emit.write(target, f"one_word({_expression(instruction).format(*pairs)})")
    elif operation in HALVES and kind in ("f16", "bf16", "f16x2", "bf16x2"):
        single = kind.removesuffix("x2")
        values = [
            f"from_halves({value}, '{single}')"
            for value in emit.reads(operands, f"b{32 if kind.endswith('2') else 16}")
        ]
        emit.write(target, f"to_halves({_expression(instruction).format(*values)}, '{kind}')")
    else:
        raise Fault(f"{operation} of {kind}")


def _expression(instruction: Instruction) -> str:
    """``max`` and ``min`` pass a NaN on only where they say so."""
    known = PASSES_NAN if "NaN" in instruction.parts else EXPRESSIONS
    return known[instruction.parts[0]]


INSTRUCTIONS = dict.fromkeys(EXPRESSIONS, compute)
