"""A kernel as Python: each basic block is translated when it first runs, once for all threads and
once for some of them.
"""

import linecache
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import arithmetic, floats, integers, matrix, moves, numbers, transfers, warp, warps
from ptx.emitter import Emitter
from ptx.flow import block_starts, meeting_points
from ptx.parse import Instruction, parse, shared_cell
from ptx.reports import Fault

OTHERS = {
    **integers.INSTRUCTIONS,
    **moves.INSTRUCTIONS,
    **transfers.INSTRUCTIONS,
    **warps.INSTRUCTIONS,
}
NOTHING = (
    "membar",
    "fence",
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "nanosleep",
)  # order or speed, of which there is none here
NAMES = {
    name: value
    for module in (numbers, arithmetic, matrix, warp)
    for name, value in vars(module).items()
    if not name.startswith("_")
} | {"np": np}  # what the Python of a block may call

END = -1
# (machine, registers, mask) → (which threads, go to which block)
Step = Callable[[Any, dict[str, Any], Any], tuple[Any, int]]


class Program:
    """One kernel. text: a module of PTX with one entry."""

    def __init__(self, text: str) -> None:
        parsed = parse(text)
        self.name, self.threads, self.parameters = parsed.name, parsed.threads, parsed.parameters
        self.instructions, self.labels = parsed.instructions, parsed.labels
        self.starts = block_starts(parsed)
        self.meeting_points = meeting_points(parsed, self.starts)
        self.cell = shared_cell(self.instructions)
        self._steps: dict[tuple[int, bool], Step] = {}

    def length(self, block: int) -> int:
        """How many instructions a block has."""
        return len(self._instructions(block))

    def is_barrier(self, block: int) -> bool:
        """Whether a block ends with a barrier of the whole program."""
        return self._instructions(block)[-1].parts[0] in ("bar", "barrier")

    def step(self, block: int, masked: bool) -> Step:
        """The Python of a block: (None or which threads branch, where they go). The others go on
        with the next block.
        """
        key = block, masked
        if key not in self._steps:
            self._steps[key] = self._translate(block, masked)
        return self._steps[key]

    def _instructions(self, block: int) -> list[Instruction]:
        stop = self.starts[block + 1] if block + 1 < len(self.starts) else len(self.instructions)
        return self.instructions[self.starts[block] : stop]

    def _translate(self, block: int, masked: bool) -> Step:
        emit = Emitter(self.name, masked)
        ended = False
        for instruction in self._instructions(block):
            emit.begin(instruction)
            ended = self._leave(emit, instruction, block) or ended
            if instruction.parts[0] not in (*NOTHING, "bra", "ret", "exit", "bar", "barrier"):
                translate(emit, instruction)
            elif instruction.parts[:2] == ("bar", "warp"):
                emit.do(f"m.check_whole_warps({emit.mask}, {emit.where})")
        if not ended:
            emit.do(f"return None, {block + 1}")

        file = f"<{self.name}, block {block}{', masked' if masked else ''}>"
        source = "def step(m, R, M):\n" + "\n".join(f"    {line}" for line in emit.lines)
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
        names = NAMES | emit.constants
        exec(compile(source, file, "exec"), names)
        step: Step = names["step"]
        return step

    def _leave(self, emit: Emitter, instruction: Instruction, block: int) -> bool:
        """Emit the jump of a branch or an exit; whether it was one."""
        operation = instruction.parts[0]
        if operation == "bra":
            target = self.starts.index(self.labels[instruction.operands[0]])
        elif operation in ("ret", "exit"):
            target = END
        else:
            return False
        emit.do(f"return {emit.predicate(instruction) if instruction.guard else None}, {target}")
        return True


def translate(emit: Emitter, instruction: Instruction) -> None:
    """Python for one instruction; a Fault that names one which nobody knows."""
    operation, kind = instruction.parts[0], instruction.parts[-1]
    floating = kind.startswith(("f16", "f32", "f64", "bf16"))
    known = floats.INSTRUCTIONS if floating and operation in floats.INSTRUCTIONS else OTHERS
    try:
        known[operation](emit, instruction)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise Fault(
            f"unknown instruction, line {instruction.line}: {instruction.text} ({error!r})"
        ) from error
