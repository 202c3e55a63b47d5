"""Triton's driver for a GPU that is not there: its JIT specialises, compiles and launches as ever,
and the PTX runs in numpy.

A device is a chip: the number of sm_90 is 90, so that each chip has compiled kernels of its own.
    CPU tensors are its memory.
"""

import ctypes
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from ptx.copy_engine import TensorMap
from ptx.machine import run
from ptx.memory import Memory
from ptx.program import Program
from ptx.reports import Reports
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ironmoe.kernels.gpu.launch import tile_of
from ironmoe.kernels.tuning import CHIPS

WORD, LONG = (1 << 32) - 1, (1 << 64) - 1


class Launched(NamedTuple):
    """What one launch did. tile: the blocks of a product; executed: instructions of all
    programs."""

    kernel: str
    chip: str
    tile: str
    programs: int
    executed: int
    seconds: float
    reports: list[str]


launches: list[Launched] = []


class Utilities:
    """What Triton asks of a driver about devices and binaries."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Only the limit of shared memory decides anything."""
        chip = CHIPS[f"sm_{device}"]
        return {
            "max_shared_mem": chip.shared_memory,
            "multiprocessor_count": chip.processors,
            "warpSize": chip.warp_size,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, most threads): the function is the program that the
        PTX is.
        """
        program = Program(binary.decode())
        return program, program, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded anywhere."""


class Launcher:
    """Runs one compiled kernel.

    Triton calls it with the arguments as they were given, constants included.
    """

    def __init__(self, source: Any, metadata: Any) -> None:
        names = source.fn.arg_names
        constant = {(names.index(at),) if isinstance(at, str) else at for at in source.constants}
        self.names = names
        self.passed = [
            i
            for i, name in enumerate(names)
            if (i,) not in constant and source.signature[name] != "constexpr"
        ]
        self.kinds = [source.signature[names[i]] for i in self.passed]
        self.metadata = metadata

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, program: Program, *rest: Any
    ) -> None:
        """``rest``: packed metadata, launch metadata, two hooks, and the kernel's arguments."""
        arguments = rest[-len(self.names) :]
        if (grid_y, grid_z) != (1, 1):
            raise NotImplementedError("a grid of one dimension only")
        reports = Reports()
        memory, maps, values = Memory(reports), dict[int, TensorMap](), list[int]()
        for at, kind in zip(self.passed, self.kinds, strict=True):
            self._pass(arguments[at], kind, self.names[at], memory, maps, values)
        # Memory for scratch, which no kernel has
        values += [0] * (len(program.parameters) - len(values))

        start = time.perf_counter()
        with _denormal_numbers():
            parameters = dict(zip(program.parameters, values, strict=True))
            executed = run(program, memory, parameters, grid_x, self.metadata.shared, maps, reports)
        tile = tile_of(dict(zip(self.names, arguments, strict=True)))
        launches.append(
            Launched(
                program.name, f"sm_{self.metadata.target.arch}",
                "×".join(map(str, tile or ())), grid_x, executed,
                time.perf_counter() - start, list(reports.texts),
            )
        )  # fmt: skip

    def _pass(
        self,
        argument: Any,
        kind: str,
        name: str,
        memory: Memory,
        maps: dict[int, TensorMap],
        values: list[int],
    ) -> None:
        """Append what an argument is to the kernel; make its memory known."""
        if isinstance(argument, TensorDescriptor):
            _add(memory, argument.base, name)
            maps[len(values)] = self._tensor_map(argument, len(maps))
            values += [
                0,
                *(n & WORD for n in argument.shape),
                *(n & LONG for n in argument.strides),
            ]
        elif isinstance(argument, Tensor):
            _add(memory, argument, name)
            values.append(argument.data_ptr())
        elif kind == "fp32":
            values.append(struct.unpack("<I", struct.pack("<f", argument))[0])
        else:
            values.append(int(argument) & (WORD if kind in ("i32", "u32") else LONG))

    def _tensor_map(self, descriptor: TensorDescriptor, number: int) -> TensorMap:
        """The box is what the compiler made of the block: at most 256 long, and as wide as the
        layout in shared memory.
        """
        meta = self.metadata.tensordesc_meta[number]
        box, swizzle = (
            meta[k] if isinstance(meta, dict) else getattr(meta, k)
            for k in ("block_size", "swizzle")
        )
        base = descriptor.base
        return TensorMap(
            base.data_ptr(),
            tuple(descriptor.shape),
            tuple(descriptor.strides),
            tuple(box),
            base.element_size(),
            int(swizzle),
        )


class Driver:
    """The driver that Triton's runtime talks to."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utilities()
        self.chip = 80

    def get_current_target(self) -> GPUTarget:
        """The chip in use."""
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        """Its number."""
        return self.chip

    def get_current_stream(self, device: int) -> int:
        """All launches follow each other."""
        return 0


driver = Driver()


def install() -> None:
    """From now on Triton launches here.

    The kernels must have been imported without TRITON_INTERPRET.
    """
    triton.runtime.driver.set_active(driver)
    CUDABackend.make_cubin = lambda self, source, *_: source.encode()  # PTX is all that is needed
    compiled = JITFunction.run

    def run_compiled(self: Any, *arguments: Any, **options: Any) -> Any:
        """The library takes its kernels for CPU tensors where TRITON_INTERPRET is set, the compiler
        where it is not.
        """
        interpreted = os.environ.pop("TRITON_INTERPRET", None)
        try:
            return compiled(self, *arguments, **options)
        finally:
            if interpreted is not None:
                os.environ["TRITON_INTERPRET"] = interpreted

    JITFunction.run = run_compiled


def _add(memory: Memory, tensor: Tensor, name: str) -> None:
    """A tensor's whole storage, once, whichever views of it are given."""
    storage = tensor.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    if size and memory.find(address) is None:
        memory.add(
            address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)), name
        )


@contextmanager
def _denormal_numbers() -> Iterator[None]:
    """A GPU has them where an instruction does not say ftz; the tests make torch flush them."""
    flushed = torch.tensor(1e-40).mul(1.0).item() == 0.0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
