"""Matrix instructions of a warp: mma.m16n8, and how its operands come from and go to shared memory.

A thread of a warp holds pairs of neighbouring columns: lane 4g + t has row g and columns 2t, 2t + 1
    of each 8 × 8 block.
"""

import numpy as np

from ptx.numbers import Array, bfloat, f16, f32, f64, u8, u16, u32
from ptx.shared_memory import SharedMemory


def multiply(kind: str, left: list[Array], right: list[Array], added: list[Array]) -> list[Array]:
    """mma.m16n8: registers of A (16 × K, by rows), B (K × 8, by columns) and C to those of D,
    float32, for all warps at once.
    """
    a = np.stack(left).reshape(-1, 2, len(left[0]) // 32, 8, 4)  # (block of K, of M, warp, g, t)
    b = np.stack(right).reshape(-1, len(left[0]) // 32, 8, 4)
    if kind == "tf32":
        a_MK = (a & u32(0xFFFFE000)).view(f32).transpose(2, 1, 3, 0, 4)
        b_NK = (b & u32(0xFFFFE000)).view(f32).transpose(1, 2, 0, 3)
    else:
        a_MK = _pairs(a, kind).transpose(2, 1, 3, 0, 4, 5)
        b_NK = _pairs(b, kind).transpose(1, 2, 0, 3, 4)

    warps = a_MK.shape[0]
    wide_a, wide_b = a_MK.astype(f64).reshape(warps, 16, -1), b_NK.astype(f64).reshape(warps, 8, -1)
    d_MN = (
        (wide_a @ wide_b.transpose(0, 2, 1))
        .reshape(warps, 2, 8, 4, 2)
        .transpose(1, 4, 0, 2, 3)
        .reshape(4, -1)
    )
    return [(d_MN[i] + added[i].view(f32)).astype(f32).view(u32) for i in range(4)]


def _pairs(registers: Array, kind: str) -> Array:
    """(…, 2) float32: the two 16-bit numbers of each register."""
    halves = np.ascontiguousarray(registers).view(u16).reshape(*registers.shape, 2)
    return bfloat(halves) if kind == "bf16" else halves.view(f16).astype(f32)


def load_matrices(
    shared: SharedMemory, offsets: Array, count: int, transposed: bool, mask: Array, where: str
) -> list[Array]:
    """ldmatrix: lane i has the address of row i % 8 of matrix i // 8; each lane gets a pair of
    neighbours of every matrix.
    """
    lane = np.arange(len(mask)) % 32
    rows = shared.load(offsets, 16, mask & (lane < 8 * count), where)
    matrices = rows.view(u16).reshape(-1, 4, 8, 8)[:, :count]
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(u32).reshape(-1, count, 32)
    return [np.ascontiguousarray(pairs[:, i]).ravel() for i in range(count)]


def store_matrices(
    shared: SharedMemory,
    offsets: Array,
    registers: list[Array],
    transposed: bool,
    mask: Array,
    where: str,
) -> None:
    """stmatrix: the reverse of ``load_matrices``."""
    matrices = np.stack(registers, 1).reshape(-1, 32, len(registers)).swapaxes(1, 2)
    matrices = np.ascontiguousarray(matrices).view(u16).reshape(-1, len(registers), 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    lane = np.arange(len(mask)) % 32
    rows = np.zeros((len(mask) // 32, 32, 16), u8)
    rows[:, : 8 * len(registers)] = (
        np.ascontiguousarray(matrices).view(u8).reshape(-1, 8 * len(registers), 16)
    )
    shared.store(offsets, rows.reshape(-1, 16), mask & (lane < 8 * len(registers)), where)
