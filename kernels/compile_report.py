"""Compile every kernel for a named GPU with no GPU present, and read what the compiler made of it.

A spill or a stack in local memory, shared memory beyond the chip's, or a matrix kernel without the chip's matrix instructions is
a fault: it would cost more than any tuning could win back, and shows here before the kernel runs anywhere.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ironmoe.kernels.gpu.launch import Launch
from ironmoe.kernels.specimens import SHORT, Specimen, specimens
from ironmoe.kernels.tuning import CHIPS, MATRIX, Chip

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


class Finding(NamedTuple):
    """What the compiler made of one kernel. Registers a thread; spills: instructions on local memory; bytes of stack and shared."""

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

    def faults(self) -> list[str]:
        """What must not be, in words; empty if all is well."""
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


def compile_report(chips: tuple[str, ...], workers: int | None = None) -> Iterator[tuple[Finding, int]]:
    """Findings in the order of ``specimens``, each with the number of kernels in all. Several processes compile."""
    jobs = [(name, i) for name in chips for i in range(len(specimens(CHIPS[name])))]
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for finding in pool.map(_job, jobs):
            yield finding, len(jobs)


def _job(job: tuple[str, int]) -> Finding:
    name, i = job
    return examine(specimens(CHIPS[name])[i], CHIPS[name])


def examine(specimen: Specimen, chip: Chip) -> Finding:
    """Compile one launch for ``chip`` and read the binary."""
    launch = specimen.launch
    compiled = triton.compile(
        _source(launch), target=_target(chip), options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )
    registers, stack, spills = _amd(compiled) if chip.name.startswith("gfx") else _nvidia(compiled)
    text = compiled.asm["amdgcn" if chip.name.startswith("gfx") else "ptx"]
    constants = launch.arguments
    tile = "×".join(str(constants[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in constants)
    return Finding(
        chip.name, specimen.name, SHORT.get(specimen.dtype, "int"), tile if tile.count("×") == 2 else "", launch.num_warps,
        launch.num_stages, registers, stack, spills, compiled.metadata.shared, len(re.findall(re.escape(MATRIX[chip.name]), text)),
    )  # fmt: skip


def _target(chip: Chip) -> GPUTarget:
    if chip.name.startswith("gfx"):
        return GPUTarget("hip", chip.name, chip.warp_size)
    return GPUTarget("cuda", int(chip.name.removeprefix("sm_")), chip.warp_size)


def _source(launch: Launch) -> ASTSource:
    """The launch as Triton itself would specialise it: sizes of 1 and None are constants, multiples of 16 are known to be."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.is_constexpr and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _nvidia(compiled: Any) -> tuple[int, int, int]:
    """(registers, bytes of stack, LDL and STL instructions) from the cubin, by the tools in Triton's package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(value) for value in re.findall(r"(?:REG|STACK):(\d+)", usage)[:2])
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", sass))


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _amd(compiled: Any) -> tuple[int, int, int]:
    """(vector registers, bytes of scratch, spilled ones) from the assembly's own account. Scalar registers that move to vector lanes
    touch no memory and are no spill."""
    text = compiled.asm["amdgcn"]

    def largest(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    return largest("vgpr_count"), largest("private_segment_fixed_size"), largest("vgpr_spill_count")
