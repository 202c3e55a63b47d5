"""What an instruction computes, where numpy has no one word for it.

Arguments are arrays, one number a thread, or one for all.
"""

import numpy as np

from ptx.numbers import Array, bfloat, f16, f32, f64, i32, i64, to_bfloat, u16, u32, u64

NAN = np.array(0x7FFFFFFF, u32).view(f32)
SMALLEST_NORMAL = f32(1.1754943508222875e-38)


def flush(x: Array) -> Array:
    """Denormal numbers to zeros of their sign (ftz)."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(f32(0), x), x)


def fma(x: Array, y: Array, z: Array) -> Array:
    """x · y + z of float32, rounded once but for ties that float64 makes."""
    return (np.asarray(x, f64) * y + z).astype(f32)


def one_nan(x: Array) -> Array:
    """With the NaN that a GPU makes: threads that compute the same have the same bits."""
    unordered = x != x
    return np.where(unordered, NAN, x).astype(x.dtype) if unordered.any() else x


def maximum(x: Array, y: Array, passes_nan: bool = False) -> Array:
    """The larger number; +0 is larger than −0.

    A NaN counts only where both are, or where ``passes_nan``.
    """
    return np.where((x == 0) & (y == 0), x + y, (np.maximum if passes_nan else np.fmax)(x, y))


def minimum(x: Array, y: Array, passes_nan: bool = False) -> Array:
    """The smaller number, with the same care."""
    return np.where((x == 0) & (y == 0), -(-x - y), (np.minimum if passes_nan else np.fmin)(x, y))


def divide(x: Array, y: Array) -> Array:
    """Integer division towards zero."""
    x, y = np.broadcast_arrays(x, y)
    divisor = np.where(y == 0, y.dtype.type(1), y)
    if x.dtype.kind == "u":
        return x // divisor
    quotient = np.abs(x.astype(i64)) // np.abs(divisor.astype(i64))
    return (np.sign(x) * np.sign(divisor) * quotient).astype(x.dtype)


def remainder(x: Array, y: Array) -> Array:
    """With the sign of ``x``."""
    return x - divide(x, y) * y


def multiply_high(x: Array, y: Array) -> Array:
    """The upper half of a product of two numbers of 32 or 64 bits."""
    if x.dtype.itemsize == 4:
        wide = i64 if x.dtype.kind == "i" else u64
        return ((x.astype(wide) * y.astype(wide)) >> wide(32)).astype(x.dtype)
    low, low_y, high, high_y = x & u64(0xFFFFFFFF), y & u64(0xFFFFFFFF), x >> u64(32), y >> u64(32)
    middle = high * low_y + (low * low_y >> u64(32))
    carry = low * high_y + (middle & u64(0xFFFFFFFF))
    return high * high_y + (middle >> u64(32)) + (carry >> u64(32))


def shift_left(x: Array, by: Array) -> Array:
    """Zeros where everything is shifted out."""
    bits = x.dtype.itemsize * 8
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: Array, by: Array) -> Array:
    """Copies of the sign come in for signed numbers, zeros for others."""
    bits = x.dtype.itemsize * 8
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def bit_field(x: Array, start: Array, length: Array) -> Array:
    """bfe of u32 or s32: ``length`` bits from ``start`` on, the sign extended for s32."""
    start, length = start.astype(i64) & 255, length.astype(i64) & 255
    field = (x.astype(i64) >> np.minimum(start, 63)) & ((i64(1) << np.minimum(length, 62)) - 1)
    if x.dtype == i32:
        sign = (x.astype(i64) >> np.minimum(start + length - 1, 31)) & 1
        field = np.where(
            (sign == 1) & (length > 0), field | ~((i64(1) << np.minimum(length, 62)) - 1), field
        )
    return field.astype(x.dtype)


def insert_bits(x: Array, into: Array, start: Array, length: Array) -> Array:
    """bfi.b32: the low ``length`` bits of ``x`` at ``start`` of ``into``."""
    start, length = start.astype(u64) & u64(255), length.astype(u64) & u64(255)
    mask = (((u64(1) << np.minimum(length, u64(32))) - u64(1)) << np.minimum(start, u64(32))) & u64(
        0xFFFFFFFF
    )
    moved = (x.astype(u64) << np.minimum(start, u64(32))) & mask
    return ((into.astype(u64) & ~mask) | moved).astype(u32)


def permute_bytes(x: Array, y: Array, selector: Array) -> Array:
    """prmt: four bytes out of eight, each by a nibble of ``selector``; its high bit spreads the
    sign.
    """
    x, y, selector = np.broadcast_arrays(x, y, selector)
    both = x.astype(u64) | y.astype(u64) << u64(32)
    permuted = np.zeros_like(x)
    for i in range(4):
        nibble = (selector >> u32(4 * i)) & u32(15)
        byte = ((both >> ((nibble & u32(7)) * u32(8)).astype(u64)) & u64(255)).astype(u32)
        sign = np.where(byte & u32(128), u32(255), u32(0))
        permuted = permuted | np.where(nibble & u32(8), sign, byte) << u32(8 * i)
    return permuted


def logic(x: Array, y: Array, z: Array, table: int) -> Array:
    """lop3: any function of three bits, by its table of eight."""
    found = np.zeros_like(x & y & z)
    for i in range(8):
        if table >> i & 1:
            found = found | (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    return found


def highest_bit(x: Array) -> Array:
    """The position of the highest 1 (u32), all ones if there is none (bfind)."""
    position = np.full(x.shape, 0xFFFFFFFF, u32)
    for bit in range(x.dtype.itemsize * 8):
        position = np.where((x >> x.dtype.type(bit)) & x.dtype.type(1), u32(bit), position)
    return position


def leading_zeros(x: Array) -> Array:
    """clz"""
    return (u32(x.dtype.itemsize * 8 - 1) - highest_bit(x)).astype(u32)


def reverse_bits(x: Array) -> Array:
    """brev"""
    reversed_ = np.zeros_like(x)
    bits = x.dtype.itemsize * 8
    one = x.dtype.type(1)
    for bit in range(bits):
        reversed_ = reversed_ | ((x >> x.dtype.type(bit)) & one) << x.dtype.type(bits - 1 - bit)
    return reversed_


def to_integer(x: Array, rounding: str, kind: np.dtype) -> Array:
    """float → integer, cut at the ends of the type; NaN is 0."""
    round_ = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    ends = np.iinfo(kind)
    rounded = np.nan_to_num(round_(x.astype(f64)), nan=0.0)
    above, below = rounded >= float(ends.max), rounded <= float(ends.min)
    return np.where(
        above, ends.max, np.where(below, ends.min, np.where(above | below, 0, rounded).astype(kind))
    ).astype(kind)


def to_tf32(x: Array) -> Array:
    """The bits (u32) of float32 with 10 bits of mantissa, rounded to nearest, ties away."""
    return (x.view(u32) + u32(0x1000)) & u32(0xFFFFE000)


def two_floats(words: Array) -> Array:
    """(…, 2) float32 in words of 64 bits."""
    return np.ascontiguousarray(words).view(f32).reshape(-1, 2)


def one_word(pairs: Array) -> Array:
    """The reverse of ``two_floats``."""
    return np.ascontiguousarray(pairs, f32).view(u64).ravel()


def from_halves(bits: Array, kind: str) -> Array:
    """(…, numbers of a register) float32 of f16 or bf16 numbers in registers of 16 or 32 bits."""
    halves = np.ascontiguousarray(bits).view(u16).reshape(-1, bits.dtype.itemsize // 2)
    return bfloat(halves) if kind == "bf16" else halves.view(f16).astype(f32)


def to_halves(values: Array, kind: str) -> Array:
    """The reverse of ``from_halves``: ``kind`` is f16, bf16, f16x2 or bf16x2."""
    halves = to_bfloat(values) if kind.startswith("bf16") else values.astype(f16).view(u16)
    return np.ascontiguousarray(halves).view(u32 if kind.endswith("x2") else u16).ravel()
