"""Writes Python for instructions: how operands are read, results written, and guards kept.

The Python works on ``R``, registers by name, each an array with an element a thread; ``M``, the
threads that run; ``m``, the machine.
"""

import re

import numpy as np

from ptx.numbers import u8, u16, u32, u64
from ptx.parse import Instruction
from ptx.reports import Fault

UNSIGNED = {"8": u8, "16": u16, "32": u32, "64": u64}
WIDTHS = (("%rd", 64), ("%rs", 16), ("%r", 32))
SPECIAL = {
    "%tid.x": "m.thread", "%laneid": "m.lane", "%ctaid.x": "m.number",
    "%nctaid.x": "m.programs_in_all", "%ntid.x": "m.threads",
}  # fmt: skip


def bits_of(kind: str) -> int:
    """Width of a type: 32 for s32, f32, b32, bf16x2 …; predicates have 1."""
    if kind == "pred":
        return 1
    if kind.endswith("x2"):
        return 64 if kind == "f32x2" else 32
    return 16 if kind == "bf16" else int(re.sub(r"\D", "", kind))


def unsigned(kind: str) -> str:
    """The numpy type, by name, in which a register holds a PTX type."""
    return "bool" if kind == "pred" else f"u{bits_of(kind)}"


def widened(register: str, value: str, kind: str) -> str:
    """A number as wide as its register."""
    bits, width = bits_of(kind), register_width(register) or bits_of(kind)
    if width == bits or kind == "pred":
        return value
    return (
        f"{value}.view(i{bits}).astype(i{width}).view(u{width})"
        if kind[0] == "s"
        else f"{value}.astype(u{width})"
    )


def register_width(register: str) -> int:
    """Bits of a register, by the beginning of its name; 0 for predicates."""
    return next((width for prefix, width in WIDTHS if register.startswith(prefix)), 0)


class Emitter:
    """The Python of one basic block.

    ``masked``: only some threads run, so the others keep what they had.
    """

    def __init__(self, kernel: str, masked: bool) -> None:
        self.kernel, self.masked = kernel, masked
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self.mask, self.where = "M", "''"

    def begin(self, instruction: Instruction) -> None:
        """What follows is Python for this instruction."""
        self.mask, self.where = "M", f"at{len(self.constants)}"
        self.constants[self.where] = (
            f"line {instruction.line} of {self.kernel}: {instruction.text[:80]}"
        )
        if instruction.guard and instruction.parts[0] not in ("bra", "ret", "exit"):
            self.lines.append(f"Q = M & {self.predicate(instruction)}")
            self.mask = "Q"

    def predicate(self, instruction: Instruction) -> str:
        """The guard as an expression."""
        register = f"R['{instruction.guard.lstrip('%')}']"
        return f"~{register}" if instruction.negated else register

    def do(self, statement: str) -> None:
        """A statement as it is."""
        self.lines.append(statement)

    def read(self, operand: str, kind: str) -> str:
        """An operand as numpy numbers of a PTX type: b, u and s with their width, f32, f64, f16;
        bf16 stays bits.
        """
        expression = self._bits(operand, kind)
        if kind[0] in "sf" and kind in ("s16", "s32", "s64", "f16", "f32", "f64"):
            return f"{expression}.view({'i' if kind[0] == 's' else 'f'}{kind[1:]})"
        return expression

    def reads(self, operands: tuple[str, ...] | list[str], kind: str) -> list[str]:
        """Several operands of one type."""
        return [self.read(operand, kind) for operand in operands]

    def array(self, operand: str, kind: str) -> str:
        """As ``read``, with an element for each thread also where the operand is one number for
        all.
        """
        expression = self.read(operand, kind)
        return (
            expression if expression.startswith("R[") else f"np.broadcast_to({expression}, M.shape)"
        )

    def write(self, register: str, expression: str) -> None:
        """``register`` becomes ``expression`` for the threads that run this instruction."""
        if register == "_":
            return
        name = f"R['{register.lstrip('%')}']"
        if self.mask == "M" and not self.masked:
            self.lines.append(f"{name} = {expression}")
        else:
            key = register.lstrip("%")
            self.lines.append(f"v = {expression}")
            self.lines.append(f"{name} = np.where({self.mask}, v, {name}) if '{key}' in R else v")

    def address(self, operand: str, kind: str) -> str:
        """[register + offset] as an expression."""
        matched = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if matched is None:
            raise Fault(f"address {operand}")
        base, offset = self.array(matched[1], kind), int(matched[2] or 0)
        return f"({base} + {self.constant(offset, kind)})" if offset else base

    def constant(self, value: int, kind: str) -> str:
        """The name of a number that is made once."""
        bits = bits_of(kind)
        pattern = value & ((1 << bits) - 1)
        name = f"k{bits}_{pattern}"
        self.constants[name] = np.bool_(pattern) if bits == 1 else UNSIGNED[str(bits)](pattern)
        return name

    def _bits(self, operand: str, kind: str) -> str:
        if operand in SPECIAL:
            return SPECIAL[operand]
        if re.match(r"%(ctaid|tid)\.", operand):
            return self.constant(0, "u32")
        if re.match(r"%(nctaid|ntid)\.", operand):
            return self.constant(1, "u32")
        if operand.startswith("%"):
            narrowed = (
                f".astype(u{bits_of(kind)})" if register_width(operand) > bits_of(kind) > 1 else ""
            )
            return f"R['{operand[1:]}']{narrowed}"
        # The address of a descriptor, which no thread reads
        if operand.startswith(self.kernel + "_param_"):
            return self.constant(0xDE5C << 48 | int(operand.rsplit("_", 1)[1]), "u64")
        if operand == "global_smem":
            return self.constant(0, kind)
        if operand[:2] in ("0f", "0d"):
            return self.constant(int(operand[2:], 16), kind)
        if operand in ("true", "false"):
            return self.constant(operand == "true", "pred")
        try:
            return self.constant(int(operand.rstrip("U"), 0), kind)
        except ValueError:
            raise Fault(f"operand {operand}") from None
