"""The types of a register's bits.

Registers are unsigned; an instruction views them as what it needs.
"""

from typing import Any

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

Array = np.ndarray[Any, Any]


def bfloat(bits: Array) -> Array:
    """float32 from the bits (u16) of a bfloat16."""
    return (bits.astype(u32) << u32(16)).view(f32)


def to_bfloat(values: Array) -> Array:
    """The bits (u16) of float32 values as bfloat16, rounded to nearest even; NaN is the one that a
    GPU writes.
    """
    bits = np.ascontiguousarray(values).view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(np.isnan(values), u16(0x7FFF), rounded)


def number(bits: Array, kind: str) -> Array:
    """float64 from 16-bit numbers: ``kind`` is bf16 or f16."""
    return (bfloat(bits) if kind == "bf16" else bits.view(f16)).astype(f64)
