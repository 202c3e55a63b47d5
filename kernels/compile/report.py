"""Compile every kernel for a named GPU with no GPU present, and read what the compiler made of it.

A spill or a stack in local memory, shared memory beyond the chip's, or a matrix kernel without the
chip's matrix instructions is a fault: it would cost more than any tuning could win back, and shows
here before the kernel runs anywhere.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

from ironmoe.kernels.compile.launches import SHORT, NamedLaunch
from ironmoe.kernels.compile.occupancy import programs_an_sm
from ironmoe.kernels.compile.specialization import source_of, target_of
from ironmoe.kernels.compile.width_launches import every_launch
from ironmoe.kernels.tuning import CHIPS, MATRIX, Chip


class Finding(NamedTuple):
    """What the compiler made of one kernel. Registers a thread; spills: instructions on local
    memory; bytes of stack and shared.

    instructions: how often the machine code has each, such as BAR, LDS, STS, LDGSTS, UTMALDG, HGMMA
    (AMD: s_barrier, ds_read_b128 …).
    error: why there is no code; empty if there is.
    """

    chip: str
    kernel: str
    dtype: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    instructions: dict[str, int]
    error: str = ""

    @property
    def programs(self) -> int:
        """How many run on one processor of the chip at the same time."""
        return programs_an_sm(CHIPS[self.chip], self.registers, self.warps, self.shared)

    @property
    def shared_traffic(self) -> tuple[int, int, int]:
        """(barriers, stores to shared memory, loads from it) in the code; those of matrices (STSM,
        LDSM) among them.
        """

        def count(*kinds: str) -> int:
            return sum(
                number for name, number in self.instructions.items() if name.startswith(kinds)
            )

        return count("BAR", "s_barrier"), count("STS", "ds_write"), count("LDS", "ds_read")

    def faults(self) -> list[str]:
        """What must not be, in words; empty if all is well."""
        if self.error:
            return [f"does not compile: {self.error}"]
        limit = CHIPS[self.chip].shared_memory
        found = []
        if self.spills or self.stack:
            found.append(f"{self.stack} bytes of stack, {self.spills} spilling instructions")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the chip has {limit}")
        rows = int(self.tile.split("×")[0]) if self.tile else 0
        if rows >= 64 and self.dtype != "fp32" and not self.matrix:
            found.append(f"no {MATRIX[self.chip]}")
        return found


Job = tuple[str, int]  # a chip, and which of its ``every_launch``


def jobs_of(chips: tuple[str, ...], only: str = "") -> list[Job]:
    """The kernels whose names contain ``only``, for each chip."""
    return [
        (chip, number)
        for chip in chips
        for number, named in enumerate(every_launch(CHIPS[chip]))
        if only in named.name
    ]


def kernel_names(chips: tuple[str, ...]) -> list[str]:
    """The kernels that are compiled for these chips, by their first names, each once."""
    launches = (named for chip in chips for named in every_launch(CHIPS[chip]))
    return list(dict.fromkeys(named.name.partition(":")[0] for named in launches))


def compile_report(jobs: Sequence[Job], pool: Executor) -> Iterator[Finding]:
    """Findings in the order of the jobs, compiled by the pool."""
    return pool.map(_job, jobs)


def _job(job: Job) -> Finding:
    name, i = job
    return examine(_of_chip(name)[i], CHIPS[name])


@cache
def _of_chip(name: str) -> list[NamedLaunch]:
    return every_launch(CHIPS[name])


def examine(named: NamedLaunch, chip: Chip) -> Finding:
    """Compile one launch for ``chip`` and read the binary. A kernel that does not compile is a
    finding too.
    """
    launch = named.launch
    what: dict[str, Any] = {
        "chip": chip.name,
        "kernel": named.name,
        "dtype": SHORT.get(named.dtype, str(named.dtype).removeprefix("torch.")),
        "tile": "×".join(map(str, launch.tile or ())),
        "warps": launch.num_warps,
        "stages": launch.num_stages,
    }
    try:
        compiled = _compile(named, chip)
    except Exception as error:  # whatever a pass of the compiler throws
        nothing = ("registers", "stack", "spills", "shared", "matrix")
        numbers: dict[str, Any] = dict.fromkeys(nothing, 0)
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(**what, **numbers, instructions={}, error=text)

    amd = chip.name.startswith("gfx")
    registers, stack, spills, instructions = _amd(compiled) if amd else _nvidia(compiled)
    matrix = compiled.asm["amdgcn" if amd else "ptx"].count(MATRIX[chip.name])
    return Finding(
        **what,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=compiled.metadata.shared,
        matrix=matrix,
        instructions=instructions,
    )


def lower(named: NamedLaunch, chip: Chip) -> None:
    """Take one launch through every pass of Triton's own down to LLVM, and leave out LLVM and the
    chip's assembler, which take most of the time.

    Raises:
        RuntimeError: a pass failed; what it says is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder, _without_llvm(), triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # the cache of 3.6 does not know that a stage is left out
        triton.knobs.runtime.add_stages_inspection_hook = _without_assembler
        _compile(named, chip)


@contextmanager
def _without_llvm() -> Iterator[None]:
    name = "DISABLE_LLVM_OPT"  # Triton's C++ code reads it
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with triton.knobs.runtime.scope():
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _without_assembler(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """Without arguments Triton asks for a key; with some it hands over the stages to be changed."""
    for last in {"ptx", "cubin", "amdgcn", "hsaco"} & set(stages or ()):
        stages[last] = _named if last in ("ptx", "amdgcn") else lambda source, metadata: b""
    return "without assembler", "without assembler"


def _named(source: Any, metadata: dict[str, Any]) -> str:
    metadata["name"] = "kernel"  # the stage that is left out would have found it
    return ""


def _compile(named: NamedLaunch, chip: Chip) -> Any:
    launch = named.launch
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source_of(launch, chip), target=target_of(chip), options=options)


def _nvidia(compiled: Any) -> tuple[int, int, int, dict[str, int]]:
    """(registers, bytes of stack, LDL and STL instructions, all of them) from the cubin, by the
    tools in Triton's package.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(value) for value in re.findall(r"(?:REG|STACK):(\d+)", usage)[:2])
    instructions = _counted(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_]*)", sass)
    return registers, stack, instructions.get("LDL", 0) + instructions.get("STL", 0), instructions


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _amd(compiled: Any) -> tuple[int, int, int, dict[str, int]]:
    """(vector registers, bytes of scratch, spilled ones, instructions) from the assembly's own
    account. Scalar registers that move to vector lanes touch no memory and are no spill.
    """
    text = compiled.asm["amdgcn"]

    def largest(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    code = _counted(r"^\t([a-z]\w+)", text)
    return (
        largest("vgpr_count"),
        largest("private_segment_fixed_size"),
        largest("vgpr_spill_count"),
        code,
    )


def _counted(pattern: str, text: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, text, re.MULTILINE)))
