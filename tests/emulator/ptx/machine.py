"""Runs the programs of a launch, a batch of them in lockstep, one thread an element of numpy
arrays.

Threads that branch apart run one side after the other, and meet again where all paths meet.
"""

from typing import Any

import numpy as np

from ptx.async_copies import AsyncCopies
from ptx.barriers import Barriers
from ptx.copy_engine import CopyEngine, TensorMap
from ptx.memory import Memory
from ptx.numbers import Array, i32, u32
from ptx.program import END, Program
from ptx.reports import Fault, Reports
from ptx.shared_memory import SharedMemory
from ptx.warpgroup import MatrixUnit

BATCH_THREADS = 4096  # more make numpy's arrays leave the caches
BATCH_SHARED = 2 << 20  # bytes
LONGEST = 10_000_000  # instructions of a program


class Machine:
    """A batch of programs. thread and lane: of each thread its number in its program and warp;
    number and program: its program's, as
    a register and as memory notes it."""

    def __init__(
        self, program: Program, first: int, count: int, grid: int, parameters: dict[str, int],
        shared: int,
        maps: dict[int, TensorMap], memory: Memory, reports: Reports,
    ) -> None:  # fmt: skip
        threads = program.threads * count
        self.parameters, self.reports, self.memory = parameters, reports, memory
        number = np.arange(threads, dtype=u32)
        self.thread, self.lane = number % u32(program.threads), number % u32(32)
        self.number = u32(first) + number // u32(program.threads)
        self.program = self.number.astype(i32)
        self.threads, self.programs_in_all = (
            np.full(threads, value, u32) for value in (program.threads, grid)
        )

        self.shared = SharedMemory(shared, count, program.threads, program.cell, reports)
        self.copies = AsyncCopies(memory, self.shared, threads, reports)
        self.barriers = Barriers(self.shared, reports)
        self.engine = CopyEngine(memory, self.shared, self.barriers, maps, reports)
        self.matrices = MatrixUnit(self.shared, threads, reports)
        self.executed = 0
        self._kernel = program

    def run(self) -> None:
        """To the end of all its programs."""
        kernel, end = self._kernel, len(self._kernel.starts)
        registers: dict[str, Array] = {}
        alive = np.ones(len(self.program), bool)
        # (block where its threads meet others, threads, next block)
        paths: list[list[Any]] = [[end, alive, 0]]
        while paths:
            meet, threads, block = paths[-1]
            threads = threads & alive
            if block == meet or not threads.any():
                paths.pop()
                continue

            step = kernel.step(block, not threads.all())
            try:
                taken, target = step(self, registers, threads)
            except KeyError as error:
                raise Fault(
                    f"block {block} of {kernel.name} reads register {error}, which nothing wrote"
                ) from error
            self._count(block, threads)
            if kernel.is_barrier(block):
                self._meet_at_barrier(threads, alive, block)
            taken = threads if taken is None else taken & threads
            others = threads & ~taken
            if target == END:
                alive = alive & ~taken
                paths[-1][2] = block + 1 if others.any() else meet
            elif not others.any():
                paths[-1][2] = target
            elif not taken.any():
                paths[-1][2] = block + 1
            else:
                paths[-1][2] = kernel.meeting_points[block]
                paths += [[paths[-1][2], others, block + 1], [paths[-1][2], taken, target]]
        self._check_quiet()

    def check_whole_warps(self, mask: Array, where: str) -> None:
        """Of an instruction that all threads of a warp must run together."""
        warps = mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            self.reports.add(f"only some threads of a warp come to {where}")

    def _count(self, block: int, threads: Array) -> None:
        running = int(threads.reshape(-1, self._kernel.threads).any(1).sum())
        self.executed += self._kernel.length(block) * running
        if self.executed > LONGEST * len(threads) // self._kernel.threads:
            raise Fault(f"{self._kernel.name} does not end")

    def _meet_at_barrier(self, threads: Array, alive: Array, block: int) -> None:
        here, all_ = (mask.reshape(-1, self._kernel.threads) for mask in (threads, alive))
        if (np.any(here, axis=1, keepdims=True) & (here != all_)).any():
            self.reports.add(
                f"only some threads come to the barrier at the end of block {block} of "
                f"{self._kernel.name}"
            )
        self.shared.barrier(threads)

    def _check_quiet(self) -> None:
        if self.copies.in_flight or not self.barriers.are_quiet():
            self.reports.add(
                f"{self._kernel.name} ends while copies to shared memory are in flight"
            )
        if self.engine.stores:
            self.reports.add(
                f"{self._kernel.name} ends while copies from shared memory are in flight"
            )


def run(
    program: Program,
    memory: Memory,
    parameters: dict[str, int],
    grid: int,
    shared: int,
    maps: dict[int, TensorMap],
    reports: Reports,
) -> int:
    """Execute ``grid`` programs with ``shared`` bytes each; how many instructions they executed in
    all.

    parameters: the bits of each, by name. maps: tensors of the copy engine, by the number of their
        parameter.
    """
    batch = max(1, min(BATCH_THREADS // program.threads, BATCH_SHARED // max(shared, 1)))
    executed = 0
    with np.errstate(all="ignore"):
        for first in range(0, grid, batch):
            count = min(batch, grid - first)
            machine = Machine(
                program, first, count, grid, parameters, shared, maps, memory, reports
            )
            machine.run()
            executed += machine.executed
    return executed
