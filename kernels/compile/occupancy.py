"""How many programs of a kernel run on one processor of a chip at the same time: registers, shared
memory, threads and programs limit it.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
occupancy calculator of Nsight Compute for the units in which registers and shared memory are given
out; for gfx942 AMD's CDNA 3 ISA guide and LLVM's AMDGPU backend.
"""

from typing import NamedTuple

from ironmoe.kernels.tuning import Chip


class Processor(NamedTuple):
    """What one SM (AMD: CU) has to give to the programs on it.

    warps, programs: that it holds at most; registers: 32-bit ones of all lanes; register_unit:
    registers a lane are given out in multiples of it; partitions: schedulers, each with its part of
    the warps and registers; reserved_shared: bytes that every program takes beside its own.
    """

    warps: int
    programs: int
    registers: int = 65_536
    register_unit: int = 8
    partitions: int = 4
    reserved_shared: int = 1024


PROCESSORS = {
    "sm_80": Processor(warps=64, programs=32),
    "sm_86": Processor(warps=48, programs=16),
    "sm_89": Processor(warps=48, programs=24),
    "sm_90": Processor(warps=64, programs=32),
    "sm_100": Processor(warps=64, programs=32),
    "sm_120": Processor(warps=48, programs=24),
    "gfx942": Processor(warps=32, programs=16, registers=131_072, reserved_shared=0),
}


def programs_an_sm(chip: Chip, registers: int, warps: int, shared_bytes: int) -> int:
    """Programs of ``warps`` warps that one processor of ``chip`` holds at once; 0 where not even
    one fits.

    Args:
        registers: of a thread.
        warps: of a program; on AMD waves of 64 lanes.
        shared_bytes: of a program, without what the chip adds.
    """
    has = PROCESSORS[chip.name]
    unit = has.register_unit
    of_a_warp = -(-max(registers, 1) // unit) * unit * chip.warp_size
    warps_with_registers = has.registers // has.partitions // of_a_warp * has.partitions
    # The largest program leaves room for what is reserved, so a processor has both together.
    all_shared = chip.shared_memory + has.reserved_shared
    with_shared = all_shared // max(shared_bytes + has.reserved_shared, 1)
    return min(has.programs, has.warps // warps, warps_with_registers // warps, with_shared)
