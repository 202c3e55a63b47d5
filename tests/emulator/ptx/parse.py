"""PTX text → instructions, labels, parameters.

Knows the form of the language, not what instructions mean.
"""

import re
from typing import NamedTuple

from ptx.reports import Fault

STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
DIRECTIVES = (".loc", ".reg", ".file", ".pragma", ".section")


class Instruction(NamedTuple):
    """One statement. parts: the operation between its dots; guard: the predicate that decides,
    unless it is "".
    """

    guard: str
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    line: int
    text: str


class Parsed(NamedTuple):
    """A kernel. labels: the number of the instruction that each stands before."""

    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> Parsed:
    """The one kernel of a module."""
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if entry is None:
        raise Fault("no kernel in this text")
    name, declared, attributes = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", attributes)
    if threads is None:
        raise Fault(f"{name} does not say how many threads it has")
    first_line = text[: entry.end()].count("\n") + 1
    instructions, labels = _body(text[entry.end() :].split("\n"), first_line)
    return Parsed(
        name, re.findall(rf"\b({name}_param_\d+)", declared), int(threads[1]), instructions, labels
    )


def _body(lines: list[str], number: int) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and labels of the lines behind the kernel's opening brace.

    Labels inside braces are told apart by a number.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes, scope_count, statement = [""], 0, ""
    for line, raw in enumerate(lines, number):
        code = raw.split("//")[0].strip()
        while code:
            if not statement and code[0] == "{":
                scope_count += 1
                scopes.append(f"@{scope_count}")
                code = code[1:].strip()
            elif not statement and code[0] == "}":
                scopes.pop()
                code = code[1:].strip()
                if not scopes:
                    return _resolve(instructions, labels), labels
            elif not statement and (label := re.match(r"(\$?[\w$]+):(?!:)\s*", code)):
                labels[label[1] + scopes[-1]] = len(instructions)
                code = code[label.end() :]
            elif not statement and code.startswith((".loc", ".file", ".section")):
                code = ""
            else:
                head, end, code = code.partition(";")
                statement = f"{statement} {head}".strip()
                code = code.strip()
                if end:
                    if not statement.startswith(DIRECTIVES):
                        instructions.append(_instruction(statement, line, scopes[-1]))
                    statement = ""
    raise Fault("the kernel has no end")


def _instruction(statement: str, line: int, scope: str) -> Instruction:
    matched = STATEMENT.match(statement)
    if matched is None:
        raise Fault(f"line {line}: {statement!r} is no instruction")
    negation, guard, operation, rest = matched.groups()
    operands = _operands(rest)
    if operation.startswith("bra"):
        operands = (operands[0] + scope,)
    return Instruction(
        guard or "", bool(negation), tuple(operation.split(".")), operands, line, statement
    )


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    operands, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*operands, last) if last else tuple(operands)


def _resolve(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """Branches out of braces mean the label outside."""
    resolved = []
    for instruction in instructions:
        if instruction.parts[0] == "bra" and instruction.operands[0] not in labels:
            instruction = instruction._replace(operands=(instruction.operands[0].split("@")[0],))
        resolved.append(instruction)
    return resolved


def elements(operand: str) -> list[str]:
    """The registers of a braced operand, or the one that stands alone."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def shared_cell(instructions: list[Instruction]) -> int:
    """The widest piece, in bytes, of which every access to shared memory is a multiple: what is
    known of it is noted by pieces.
    """
    return min((_shared_width(instruction) for instruction in instructions), default=16)


def _shared_width(instruction: Instruction) -> int:
    operation, *rest = instruction.parts
    if operation in ("ld", "st", "atom") and any(part.startswith("shared") for part in rest):
        vector = next((int(part[1:]) for part in rest if re.fullmatch(r"v[248]", part)), 1)
        return min(vector * int(re.sub(r"\D", "", rest[-1])) // 8, 16)
    if operation == "cp" and rest[1] in ("ca", "cg"):
        return int(instruction.operands[2], 0)
    return 16
