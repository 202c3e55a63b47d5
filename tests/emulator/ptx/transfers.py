"""Loads, stores and copies → Python."""

import re

from ptx.emitter import Emitter, bits_of, unsigned, widened
from ptx.parse import Instruction, elements
from ptx.reports import Fault


def load(emit: Emitter, instruction: Instruction) -> None:
    """ld from parameters, global or shared memory."""
    target, source = instruction.operands
    kind = instruction.parts[-1]
    if instruction.parts[1] == "param":
        offset = re.fullmatch(r"\[(\w+)(?:\+0)?\]", source)
        if offset is None:
            raise Fault(f"parameter {source}")
        emit.write(
            target,
            widened(
                target, f"np.full(M.shape, m.parameters['{offset[1]}'], {unsigned(kind)})", kind
            ),
        )
        return
    registers, width = elements(target), bits_of(kind) // 8
    arguments = f"{_address(emit, instruction, source)}, {width * len(registers)}, {emit.mask}"
    emit.do(
        f"loaded = {_call(instruction, 'load')}({arguments}, "
        f"{_place(emit, instruction)}).view(u{8 * width})"
    )
    for i, register in enumerate(registers):
        emit.write(register, widened(register, f"loaded[:, {i}].copy()", kind))


def store(emit: Emitter, instruction: Instruction) -> None:
    """st to global or shared memory."""
    target, source = instruction.operands
    kind = instruction.parts[-1]
    bits = bits_of(kind)
    values = [
        emit.array(register, "b16" if bits == 8 else f"b{bits}") for register in elements(source)
    ]
    columns = ", ".join(f"{value}.astype(u{bits})" for value in values)
    bytes_ = f"np.stack([{columns}], 1).view(u8).reshape(len(M), -1)"
    emit.do(
        f"{_call(instruction, 'store')}({_address(emit, instruction, target)}, {bytes_}, "
        f"{emit.mask}, {_place(emit, instruction)})"
    )


def add_atomically(emit: Emitter, instruction: Instruction) -> None:
    """atom.shared.add.u32: a histogram."""
    parts = instruction.parts
    if (
        (not parts[1].startswith("shared") and "shared" not in parts)
        or "add" not in parts
        or parts[-1] != "u32"
    ):
        raise Fault(f"unknown instruction {'.'.join(parts)}")
    target, address, value = instruction.operands
    emit.do(
        f"before = m.shared.add({emit.address(address, 'u32')}, {emit.array(value, 'u32')}, "
        f"{emit.mask}, {emit.where})"
    )
    emit.write(target, "before")


def copy(emit: Emitter, instruction: Instruction) -> None:
    """cp.async, and cp.async.bulk of boxes."""
    parts, operands = instruction.parts, instruction.operands
    bulk = parts[2] == "bulk"
    unit = "m.engine" if bulk else "m.copies"
    if parts[2 + bulk] == "commit_group":
        emit.do(f"{unit}.commit({emit.mask})")
    elif parts[2 + bulk] == "wait_group":
        emit.do(f"{unit}.wait({int(operands[0], 0)}, {emit.mask})")
    elif parts[2] == "wait_all":
        emit.do(f"m.copies.commit({emit.mask}); m.copies.wait(0, {emit.mask})")
    elif parts[2:4] == ("bulk", "tensor"):
        _copy_box(emit, instruction)
    elif parts[2] in ("ca", "cg"):
        width = int(operands[2], 0)
        size = emit.read(operands[3], "u32") if len(operands) > 3 else emit.constant(width, "u32")
        target, source = emit.address(operands[0], "u32"), emit.address(operands[1], "u64")
        emit.do(
            f"m.copies.start({target}, {source}, {width}, {size}, {emit.mask}, m.program, "
            f"{emit.where})"
        )
    else:
        raise Fault(f"unknown instruction {'.'.join(parts)}")


def _copy_box(emit: Emitter, instruction: Instruction) -> None:
    """A box between global and shared memory: operands as they stand, the tensor's with the box's
    first corner.
    """
    operands = instruction.operands
    to_global = "bulk_group" in instruction.parts
    if not to_global and not any(part.startswith("mbarrier") for part in instruction.parts):
        raise Fault(f"unknown instruction {'.'.join(instruction.parts)}")
    tensor = re.fullmatch(r"\[\s*(%\w+)\s*,\s*(\{[^}]*\})\s*\]", operands[0 if to_global else 1])
    if tensor is None:
        raise Fault(f"box {operands}")
    corner = f"[{', '.join(emit.reads(elements(tensor[2]), 'u32'))}]"
    descriptor, shared = (
        emit.read(tensor[1], "u64"),
        emit.address(operands[1 if to_global else 0], "u32"),
    )
    if to_global:
        emit.do(
            f"m.engine.store({descriptor}, {corner}, {shared}, {emit.mask}, m.program, "
            f"{emit.where})"
        )
    else:
        barrier = emit.address(operands[2], "u32")
        emit.do(
            f"m.engine.load({shared}, {descriptor}, {corner}, {barrier}, {emit.mask}, m.program, "
            f"{emit.where})"
        )


def barrier(emit: Emitter, instruction: Instruction) -> None:
    """mbarrier"""
    operation, operands = instruction.parts[1], instruction.operands
    if operation == "init":
        emit.do(
            f"m.barriers.create({emit.address(operands[0], 'u32')}, {int(operands[1], 0)}, "
            f"{emit.mask})"
        )
    elif operation == "inval":
        emit.do(
            f"m.barriers.destroy({emit.address(operands[0], 'u32')}, {emit.mask}, {emit.where})"
        )
    elif operation == "arrive" and "expect_tx" in instruction.parts:
        announced = emit.read(operands[2], "u32")
        emit.do(
            f"m.barriers.arrive({emit.address(operands[1], 'u32')}, {announced}, {emit.mask}, "
            f"{emit.where})"
        )
    elif operation == "arrive":
        emit.do(
            f"m.barriers.arrive({emit.address(operands[1], 'u32')}, {emit.constant(0, 'u32')}, "
            f"{emit.mask}, {emit.where})"
        )
    elif operation == "try_wait":
        arguments = (
            f"{emit.address(operands[1], 'u32')}, {emit.read(operands[2], 'u32')}, "
            f"{emit.mask}, {emit.where}"
        )
        emit.write(operands[0], f"m.barriers.wait({arguments})")
    else:
        raise Fault(f"unknown instruction {'.'.join(instruction.parts)}")


def _is_shared(instruction: Instruction) -> bool:
    return any(part.startswith("shared") for part in instruction.parts)


def _address(emit: Emitter, instruction: Instruction, operand: str) -> str:
    return emit.address(operand, "u32" if _is_shared(instruction) else "u64")


def _call(instruction: Instruction, what: str) -> str:
    return f"m.shared.{what}" if _is_shared(instruction) else f"m.memory.{what}"


def _place(emit: Emitter, instruction: Instruction) -> str:
    """The last arguments: global memory knows the program of each thread, shared memory is one
    program's.
    """
    return emit.where if _is_shared(instruction) else f"m.program, {emit.where}"


INSTRUCTIONS = {"ld": load, "st": store, "atom": add_atomically, "cp": copy, "mbarrier": barrier}
