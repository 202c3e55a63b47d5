"""Instructions of whole warps → Python."""

import re

from ptx.emitter import Emitter
from ptx.parse import Instruction, elements
from ptx.reports import Fault


def shuffle(emit: Emitter, instruction: Instruction) -> None:
    """shfl.sync"""
    target, value, lane, clamp = instruction.operands[:4]
    _whole_warps(emit)
    arguments = (
        f"{emit.array(value, 'b32')}, '{instruction.parts[2]}', "
        f"{emit.array(lane, 'b32')}, {emit.array(clamp, 'b32')}"
    )
    emit.write(target.split("|")[0], f"shuffle({arguments})")


def reduce(emit: Emitter, instruction: Instruction) -> None:
    """redux.sync"""
    kind = instruction.parts[-1]
    if kind[0] not in "sub":
        raise Fault(f"redux of {kind}")
    _whole_warps(emit)
    emit.write(
        instruction.operands[0],
        f"reduce({emit.array(instruction.operands[1], kind)}, '{instruction.parts[2]}').view(u32)",
    )


def vote(emit: Emitter, instruction: Instruction) -> None:
    """vote.sync"""
    target, predicate = instruction.operands[:2]
    _whole_warps(emit)
    value = emit.array(predicate.lstrip("!"), "pred")
    emit.write(
        target, f"vote({'~' if predicate.startswith('!') else ''}{value}, '{instruction.parts[2]}')"
    )


def match(emit: Emitter, instruction: Instruction) -> None:
    """match.any.sync"""
    if instruction.parts[1] != "any":
        raise Fault("match.all")
    _whole_warps(emit)
    emit.write(
        instruction.operands[0],
        f"match({emit.array(instruction.operands[1], instruction.parts[-1])})",
    )


def elect(emit: Emitter, instruction: Instruction) -> None:
    """elect.sync: the first lane."""
    _, predicate = instruction.operands[0].split("|")
    emit.write(predicate, "m.lane == 0")


def multiply(emit: Emitter, instruction: Instruction) -> None:
    """mma.sync of 16-bit numbers and tf32, with float32 sums."""
    kind = instruction.parts[-2]
    if (
        not instruction.parts[3].startswith("m16n8")
        or kind not in ("bf16", "f16", "tf32")
        or instruction.parts[-1] != "f32"
    ):
        raise Fault(f"unknown instruction {'.'.join(instruction.parts)}")
    target, *operands = (elements(operand) for operand in instruction.operands)
    _whole_warps(emit)
    arguments = ", ".join(
        f"[{', '.join(emit.array(register, 'b32') for register in registers)}]"
        for registers in operands
    )
    _write_all(emit, target, f"multiply('{kind}', {arguments})")


def load_matrices(emit: Emitter, instruction: Instruction) -> None:
    """ldmatrix"""
    target, address = instruction.operands
    registers = elements(target)
    _whole_warps(emit)
    arguments = (
        f"m.shared, {emit.address(address, 'u32')}, {len(registers)}, "
        f"{'trans' in instruction.parts}, {emit.mask}, {emit.where}"
    )
    _write_all(emit, registers, f"load_matrices({arguments})")


def store_matrices(emit: Emitter, instruction: Instruction) -> None:
    """stmatrix"""
    address, source = instruction.operands
    _whole_warps(emit)
    registers = ", ".join(emit.array(register, "b32") for register in elements(source))
    arguments = (
        f"m.shared, {emit.address(address, 'u32')}, [{registers}], "
        f"{'trans' in instruction.parts}, {emit.mask}, {emit.where}"
    )
    emit.do(f"store_matrices({arguments})")


def group_multiply(emit: Emitter, instruction: Instruction) -> None:
    """wgmma: products, groups of products, and waiting for them.

    Its fence orders registers, which here are in order.
    """
    operation = instruction.parts[1]
    if operation == "mma_async":
        _start_product(emit, instruction)
    elif operation == "commit_group":
        emit.do(f"m.matrices.commit({emit.mask})")
    elif operation == "wait_group":
        emit.do(f"m.matrices.wait({int(instruction.operands[0], 0)}, {emit.mask})")
    elif operation != "fence":
        raise Fault(f"unknown instruction {'.'.join(instruction.parts)}")


def _start_product(emit: Emitter, instruction: Instruction) -> None:
    sums, left, right, keep, *immediates = instruction.operands
    shape = next((part for part in instruction.parts if re.fullmatch(r"m64n\d+k16", part)), None)
    kind = instruction.parts[-1]
    in_registers = left.startswith("{")
    signs, transposed = immediates[:2], [int(flag) for flag in immediates[2:]]
    if (
        shape is None
        or kind not in ("bf16", "f16")
        or "f32" not in instruction.parts
        or [int(sign) for sign in signs] != [1, 1]
    ):
        raise Fault(f"unknown instruction {instruction.text}")
    columns, terms = (int(number) for number in re.findall(r"[nk](\d+)", shape))

    _whole_warps(emit)
    registers = elements(sums)
    a = (
        f"[{', '.join(emit.array(register, 'b32') for register in elements(left))}]"
        if in_registers
        else emit.array(left, "u64")
    )
    d = f"[{', '.join(emit.array(register, 'b32') for register in registers)}]"
    flags = (
        (False, bool(transposed[0])) if in_registers else (bool(transposed[0]), bool(transposed[1]))
    )
    arguments = (
        f"{columns}, {terms}, '{kind}', {a}, {emit.array(right, 'u64')}, {d}, "
        f"{emit.read(keep, 'pred')}"
    )
    _write_all(
        emit, registers, f"m.matrices.multiply({arguments}, {flags}, {emit.mask}, {emit.where})"
    )


def _whole_warps(emit: Emitter) -> None:
    """All threads of a warp must be here: that is what the instruction is."""
    if emit.mask != "M" or emit.masked:
        emit.do(f"m.check_whole_warps({emit.mask}, {emit.where})")


def _write_all(emit: Emitter, registers: list[str], results: str) -> None:
    emit.do(f"results = {results}")
    for i, register in enumerate(registers):
        emit.write(register, f"results[{i}]")


INSTRUCTIONS = {
    "shfl": shuffle, "redux": reduce, "vote": vote, "match": match, "elect": elect, "mma": multiply,
    "ldmatrix": load_matrices,
    "stmatrix": store_matrices, "wgmma": group_multiply,
}  # fmt: skip
