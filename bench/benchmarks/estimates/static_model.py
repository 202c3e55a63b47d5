"""How fast a product should be, from what the compiler made of it: no GPU, no measurement, every
assumption a constant below.

An SM works on a few programs at once. A program has a serial part (indices to wait for, first
loads, an epilogue) and a part that keeps tensor cores or the path to L2 busy. Programs hide each
other's serial parts, as far as registers and shared memory let more than one be there. Left out:
DRAM (``roofline`` has its bytes), pipelines that are too short for the latency of a load, bank
conflicts, clocks that fall.
"""

from typing import NamedTuple

from ironmoe.kernels.compile.occupancy import programs_an_sm
from ironmoe.kernels.tuning import CHIPS, Chip

ELEMENT = 2  # bytes of a bfloat16
# Of the whole chip: NVIDIA's A100 whitepaper. None is published for the H100, which is taken to
# have the same.
L2_BYTES_A_CLOCK = 5120
L2_SHARE = 0.8  # of it that a kernel gets. Assumed
L2_LATENCY = 280  # clocks. Assumed: public pointer chases on both chips find 200 to 300
DEPENDENT_LOADS = 4  # one after another before the first product: expert, offset, token, operand
SCHEDULERS = 4  # of an SM; each issues an instruction of a warp a clock
LAUNCH_GAP_MS = 0.003  # from the end of a kernel to the next one's first program. Assumed


class Machine(NamedTuple):
    """A GPU. clock: GHz; tensor_flops: of dense bfloat16, a clock and SM; tflops, terabytes: what
    products and copies reach a second.
    """

    name: str
    chip: Chip
    clock: float
    tensor_flops: int
    tflops: float
    terabytes: float

    @property
    def tensor_rate(self) -> float:
        """FLOPs a clock and SM that can be kept up. The limit of large products is power, not the
        circuit."""
        return min(self.tensor_flops, self.tflops * 1e3 / self.clock / self.chip.processors)

    @property
    def l2_rate(self) -> float:
        """Bytes a clock and SM that L2 gives while all SMs ask."""
        return L2_BYTES_A_CLOCK * L2_SHARE / self.chip.processors


MACHINES = {
    # Clocks and FLOPs: NVIDIA's data sheets (SXM). 790 TFLOP/s (8192³) and 3.0 TB/s (a copy) were
    # measured on an H100; the A100 is taken to keep 0.87 of its 312 TFLOP/s and 0.9 of its 2.04
    # TB/s.
    "sm_90": Machine(
        "H100", CHIPS["sm_90"], clock=1.755, tensor_flops=4096, tflops=790.0, terabytes=3.0
    ),
    "sm_80": Machine(
        "A100", CHIPS["sm_80"], clock=1.41, tensor_flops=2048, tflops=271.0, terabytes=1.84
    ),
}


class Product(NamedTuple):
    """A grouped product as it is launched, and what the compiler made of it.

    m, n, k: rows, accumulated columns (both halves of a gated unit) and terms of a program's step;
    steps: of a program; programs: in all; epilogue_bytes: that a program reads and writes after
    them; code: instructions, most of which run once.
    """

    m: int
    n: int
    k: int
    steps: int
    programs: int
    epilogue_bytes: int
    warps: int
    registers: int
    shared: int
    code: int

    @property
    def l2_bytes(self) -> int:
        """Bytes of both operands in one step."""
        return (self.m + self.n) * self.k * ELEMENT

    @property
    def flops(self) -> int:
        """FLOPs of one step."""
        return 2 * self.m * self.n * self.k


class Estimate(NamedTuple):
    """resident: programs an SM; waves: over all SMs; l2_needed: bytes a clock and SM that would
    keep the tensor cores busy; tensor, l2, serial: microseconds of one program that has the SM for
    itself; ms: of the kernel.
    """

    resident: int
    waves: float
    l2_needed: float
    tensor: float
    l2: float
    serial: float
    ms: float


def estimate(product: Product, machine: Machine) -> Estimate:
    """Estimate the kernel by itself, from the SM that has the most programs.

    Raises:
        ValueError: not even one program fits on an SM.
    """
    p, clocks_a_us = product, machine.clock * 1e3
    resident = programs_an_sm(machine.chip, p.registers, p.warps, p.shared)
    if resident == 0:
        asked = f"{p.registers} registers, {p.warps} warps and {p.shared} bytes"
        raise ValueError(f"{asked} do not fit on an SM of {machine.name}")

    # In clocks, of one program: what it asks of the tensor cores and of L2, and the part in which
    # it does neither. While it waits or writes, the other programs of the SM work.
    tensor = p.steps * p.flops / machine.tensor_rate
    loads = p.steps * p.l2_bytes / machine.l2_rate
    stores = p.epilogue_bytes / machine.l2_rate
    issue = p.code * p.warps / SCHEDULERS
    serial = DEPENDENT_LOADS * L2_LATENCY + max(issue, stores)
    busy = max(tensor, loads + stores)
    alone = max(tensor, loads) + serial

    an_sm = -(-p.programs // machine.chip.processors)  # the one with the most of them
    clocks = an_sm * max(busy, alone / min(resident, max(an_sm, 1)))
    return Estimate(
        resident=resident,
        waves=p.programs / (machine.chip.processors * resident),
        l2_needed=p.l2_bytes * machine.tensor_flops / p.flops,
        tensor=tensor / clocks_a_us,
        l2=(loads + stores) / clocks_a_us,
        serial=serial / clocks_a_us,
        ms=clocks / clocks_a_us * 1e-3,
    )


def expected_tiles(rows: int, num_experts: int, m: int) -> int:
    """How many tiles of ``m`` rows there are if every expert has its share of the rows. The last
    tile of each is half empty on average."""
    if rows <= num_experts:
        return rows
    return max(-(-rows // m), min(rows, rows // m + num_experts // 2))
