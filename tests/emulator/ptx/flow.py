"""Basic blocks, and where the threads of a branch meet again."""

from ptx.parse import Instruction, Parsed

ENDS = ("bra", "ret", "exit", "bar", "barrier")


def block_starts(parsed: Parsed) -> list[int]:
    """The first instruction of every block: behind a branch or a barrier, and at a label."""
    starts = {0, *parsed.labels.values()}
    starts |= {
        at + 1 for at, instruction in enumerate(parsed.instructions) if ends_block(instruction)
    }
    return sorted(at for at in starts if at < len(parsed.instructions))


def ends_block(instruction: Instruction) -> bool:
    """Whether the next instruction may not be what runs next."""
    return instruction.parts[0] in ENDS and instruction.parts[:2] != ("bar", "warp")


def meeting_points(parsed: Parsed, starts: list[int]) -> list[int]:
    """Block → its immediate postdominator: the block that all its paths pass next.

    One past the last block is the end.

    Sets of blocks are the bits of a number. The nearest of a block's postdominators is the one that
    has the most itself.
    """
    end = len(starts)
    successors = [_successors(parsed, starts, block) for block in range(end)]
    everything = (1 << (end + 1)) - 1
    passed = [everything] * end + [1 << end]
    changed = True
    while changed:
        changed = False
        for block in range(end - 1, -1, -1):
            common = everything
            for successor in successors[block]:
                common &= passed[successor]
            changed |= passed[block] != common | 1 << block
            passed[block] = common | 1 << block

    return [_nearest(passed[block] & ~(1 << block), passed, end) for block in range(end)]


def _nearest(candidates: int, passed: list[int], end: int) -> int:
    blocks = [block for block in range(end + 1) if candidates >> block & 1]
    return max(blocks, key=lambda block: passed[block].bit_count()) if blocks else end


def _successors(parsed: Parsed, starts: list[int], block: int) -> list[int]:
    end = len(starts)
    last = parsed.instructions[
        (starts[block + 1] if block + 1 < end else len(parsed.instructions)) - 1
    ]
    if last.parts[0] == "bra":
        targets = [starts.index(parsed.labels[last.operands[0]])]
    elif last.parts[0] in ("ret", "exit"):
        targets = [end]
    else:
        return [block + 1]
    return [*targets, block + 1] if last.guard else targets
