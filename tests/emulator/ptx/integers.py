"""Integer and logic instructions → Python."""

from ptx.emitter import Emitter, bits_of, unsigned
from ptx.parse import Instruction
from ptx.reports import Fault

INFIX = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
CALLS = {  # → function of the operands, as numbers of the instruction's type
    "max": "np.maximum", "min": "np.minimum", "div": "divide", "rem": "remainder",
    "brev": "reverse_bits", "popc": "np.bitwise_count",
    "clz": "leading_zeros", "bfind": "highest_bit",
}  # fmt: skip
COUNTS = ("popc", "clz", "bfind")  # their result is u32, whatever they look at


def infix(emit: Emitter, instruction: Instruction) -> None:
    """add, sub, and, or, xor: the same for signed and unsigned numbers."""
    kind = unsigned_kind(instruction.parts[-1])
    left, right = emit.reads(instruction.operands[1:], kind)
    emit.write(instruction.operands[0], f"{left} {INFIX[instruction.parts[0]]} {right}")


def unary(emit: Emitter, instruction: Instruction) -> None:
    """not, cnot, neg, abs"""
    operation, kind = instruction.parts[0], instruction.parts[-1]
    value = emit.read(instruction.operands[1], kind)
    expression = {"not": "~{}", "neg": "-{}", "abs": "np.abs({})"}[operation].format(value)
    emit.write(instruction.operands[0], f"({expression}).view({unsigned(kind)})")


def call(emit: Emitter, instruction: Instruction) -> None:
    """A function of this package, or of numpy."""
    operation, kind = instruction.parts[0], instruction.parts[-1]
    if operation == "bfind" and (kind[0] == "s" or "shiftamt" in instruction.parts):
        raise Fault("bfind of signed numbers, or as a shift")
    arguments = ", ".join(emit.reads(instruction.operands[1:], kind))
    ending = "astype(u32)" if operation in COUNTS else f"view({unsigned(kind)})"
    emit.write(instruction.operands[0], f"{CALLS[operation]}({arguments}).{ending}")


def product(emit: Emitter, instruction: Instruction) -> None:
    """mul and mad: lo, hi and wide."""
    kind = instruction.parts[-1]
    target, *factors = instruction.operands
    left, right = emit.reads(factors[:2], kind)
    if "wide" in instruction.parts:
        wide = f"{kind[0]}{2 * bits_of(kind)}"
        as_wide = wide.replace("s", "i")
        expression = f"({left}.astype({as_wide}) * {right}).view({unsigned(wide)})"
    elif "hi" in instruction.parts:
        wide, expression = kind, f"multiply_high({left}, {right}).view({unsigned(kind)})"
    else:
        wide = kind
        expression = " * ".join(emit.reads(factors[:2], unsigned_kind(kind)))
    if instruction.parts[0] == "mad":
        expression += f" + {emit.read(factors[2], unsigned_kind(wide))}"
    emit.write(target, expression)


def shift(emit: Emitter, instruction: Instruction) -> None:
    """shl, shr: the amount is u32."""
    operation, kind = instruction.parts[0], instruction.parts[-1]
    target, value, by = instruction.operands
    name = "shift_left" if operation == "shl" else "shift_right"
    emit.write(
        target, f"{name}({emit.read(value, kind)}, {emit.read(by, 'u32')}).view({unsigned(kind)})"
    )


def bit_field(emit: Emitter, instruction: Instruction) -> None:
    """bfe: both the start and the length are u32."""
    kind = instruction.parts[-1]
    target, value, start, length = instruction.operands
    if bits_of(kind) != 32:
        raise Fault("bfe of 64 bits")
    arguments = f"{emit.read(value, kind)}, {emit.read(start, 'u32')}, {emit.read(length, 'u32')}"
    emit.write(target, f"bit_field({arguments}).view(u32)")


def words(emit: Emitter, instruction: Instruction) -> None:
    """bfi, prmt, lop3: on b32."""
    operation = instruction.parts[0]
    target, *operands = instruction.operands
    if operation == "lop3":
        arguments = [*emit.reads(operands[:3], "b32"), str(int(operands[3], 0))]
    elif operation == "prmt" and len(instruction.parts) > 2:
        raise Fault("prmt with a mode")
    else:
        arguments = emit.reads(operands, "b32")
    name = {"bfi": "insert_bits", "prmt": "permute_bytes", "lop3": "logic"}[operation]
    emit.write(target, f"{name}({', '.join(arguments)})")


def unsigned_kind(kind: str) -> str:
    """The type without its sign."""
    return kind if kind == "pred" else f"b{bits_of(kind)}"


INSTRUCTIONS = {
    **dict.fromkeys(INFIX, infix),
    **dict.fromkeys(("not", "neg", "abs"), unary),
    **dict.fromkeys(CALLS, call),
    **dict.fromkeys(("mul", "mad"), product),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("bfi", "prmt", "lop3"), words),
    "bfe": bit_field,
}
