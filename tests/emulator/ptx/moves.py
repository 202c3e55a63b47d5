"""Instructions that move, convert, compare and choose → Python."""

from ptx.emitter import Emitter, bits_of, unsigned, widened
from ptx.parse import Instruction, elements
from ptx.reports import Fault

COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
    "hi": ">", "hs": ">=",
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64")
ROUNDINGS = ("rzi", "rni", "rmi", "rpi")


def move(emit: Emitter, instruction: Instruction) -> None:
    """mov, also between a register and the parts of one."""
    kind = f"b{bits_of(instruction.parts[-1])}" if instruction.parts[-1] != "pred" else "pred"
    target, source = instruction.operands
    if target.startswith("{"):
        parts = elements(target)
        bits = bits_of(kind) // len(parts)
        emit.do(f"whole = {emit.array(source, kind)}")
        for i, part in enumerate(parts):
            emit.write(part, f"(whole >> {emit.constant(bits * i, kind)}).astype(u{bits})")
    elif source.startswith("{"):
        parts = elements(source)
        bits = bits_of(kind) // len(parts)
        values = emit.reads(parts, f"b{bits}")
        shifted = (
            f"{value}.astype(u{bits_of(kind)}) << {emit.constant(bits * i, kind)}"
            for i, value in enumerate(values)
        )
        emit.write(target, " | ".join(f"({value})" for value in shifted))
    else:
        emit.write(target, emit.array(source, kind))


def address_of_parameter(emit: Emitter, instruction: Instruction) -> None:
    """cvta: addresses of all kinds are the same numbers here."""
    emit.write(instruction.operands[0], emit.array(instruction.operands[1], "u64"))


def select(emit: Emitter, instruction: Instruction) -> None:
    """selp"""
    kind = f"b{bits_of(instruction.parts[-1])}"
    target, yes, no, predicate = instruction.operands
    emit.write(
        target,
        f"np.where({emit.array(predicate, 'pred')}, {emit.read(yes, kind)}, {emit.read(no, kind)})",
    )


def compare(emit: Emitter, instruction: Instruction) -> None:
    """setp, with its logic and a third operand where it has them."""
    _, comparison, *modifiers, kind = instruction.parts
    target, left, right, *third = instruction.operands
    if kind in ("f16x2", "bf16x2"):
        for half, register in enumerate(target.split("|")):
            x, y = (
                f"from_halves({value}, '{kind[:-2]}')[:, {half}]"
                for value in (emit.array(v, "b32") for v in (left, right))
            )
            emit.write(register, _comparison(comparison, x, y, kind[:-2]))
        return
    if "|" in target:
        raise Fault("setp of two predicates")
    x, y = (_operand(emit, value, kind, "ftz" in modifiers) for value in (left, right))
    expression = _comparison(comparison, x, y, kind)
    for logic, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        if logic in modifiers:
            negated = third[0].startswith("!")
            predicate = emit.read(third[0].lstrip("!"), "pred")
            expression = f"({expression}) {sign} {'~' if negated else ''}{predicate}"
    emit.write(target, expression)


def _operand(emit: Emitter, operand: str, kind: str, flushed: bool) -> str:
    value = emit.read(operand, "b16" if kind == "bf16" else kind)
    value = f"bfloat({value})" if kind == "bf16" else value
    return f"flush({value})" if flushed else value


def _comparison(comparison: str, x: str, y: str, kind: str) -> str:
    """Comparisons with NaN are false; those that end in u are true, and so is nan."""
    unordered = f"np.isnan({x}) | np.isnan({y})"
    if comparison == "nan":
        return unordered
    if comparison == "num":
        return f"~({unordered})"
    if kind in FLOATS and len(comparison) == 3:
        return f"({x} {COMPARISONS[comparison[:2]]} {y}) | {unordered}"
    if kind in FLOATS and comparison == "ne":
        return f"({x} < {y}) | ({x} > {y})"
    return f"{x} {COMPARISONS[comparison]} {y}"


def convert(emit: Emitter, instruction: Instruction) -> None:
    """cvt, by what it goes from and to."""
    to, source = instruction.parts[-2:]
    target, *operands = instruction.operands
    if to in ("bf16x2", "f16x2"):
        high, low = (
            f"to_halves({emit.read(operand, 'f32')}, '{to[:-2]}').astype(u32)"
            for operand in operands
        )
        emit.write(target, f"({high} << {emit.constant(16, 'u32')}) | {low}")
        return
    value = emit.read(operands[0], "b16" if source == "bf16" else source)
    emit.write(
        target,
        widened(target, f"({_converted(value, source, to, instruction)}).view({unsigned(to)})", to),
    )


def _converted(value: str, source: str, to: str, instruction: Instruction) -> str:
    if "sat" in instruction.parts:
        raise Fault("cvt.sat")
    if source in ("bf16", "f16") and to in FLOATS:
        return (
            f"number({value}, '{source}').astype({to})"
            if to != "bf16"
            else f"to_bfloat({value}.astype(f32))"
        )
    if source in FLOATS and to == "bf16":
        return f"to_bfloat({value})"
    if source in FLOATS and to in FLOATS:
        rounding = next((part for part in instruction.parts if part in ROUNDINGS), None)
        return f"{_rounded(value, rounding)}.astype({to})"
    if to == "tf32":
        return f"to_tf32({value})"
    if source in FLOATS:
        rounding = next(part for part in instruction.parts if part in ROUNDINGS)
        wide = (
            f"number({value}, 'f16')"
            if source == "f16"
            else f"bfloat({value})"
            if source == "bf16"
            else value
        )
        return f"to_integer({wide}, '{rounding}', np.dtype({_integer(to)}))"
    if to == "bf16":
        return f"to_bfloat({value}.astype(f32))"
    return f"{value}.astype({to if to in FLOATS else _integer(to)})"


def _rounded(value: str, rounding: str | None) -> str:
    names = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
    return f"{names[rounding]}({value})" if rounding else value


def _integer(kind: str) -> str:
    return kind.replace("s", "i").replace("b", "u")


INSTRUCTIONS = {
    "mov": move, "cvta": address_of_parameter, "selp": select, "setp": compare, "cvt": convert,
}  # fmt: skip
