"""Counter-based random numbers: each draw depends on (seed, example, restart) and on nothing else.

So batch size, order, the number of devices and an interruption change nothing. The generator is
SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): it mixes the bits of a counter, in integer arithmetic
that is the same on every device.
"""

import math

import torch
from torch import Tensor

# GOLDEN is 2⁶⁴/φ. All are signed 64-bit integers, and tensors wrap around as the method wants.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX2 = 0x94D049BB133111EB - (1 << 64)


def example_keys(seed: int, indices: Tensor, restart: int | Tensor) -> Tensor:
    """(B,) int64 keys for the examples with numbers ``indices`` (B,). ``restart`` is the number of
    the attempt: one for all, or one each (B,)."""
    keys = mix(indices.to(torch.int64) + _wrap(seed))
    return mix(keys * GOLDEN + restart)


def uniform(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, stream: int = 0) -> Tensor:
    """(B, *shape) uniform in [0, 1), 24 random bits each. Draws with one key but other ``stream``
    are independent of each other."""
    numbers = torch.arange(math.prod(shape), device=keys.device, dtype=torch.int64)
    bits = mix(mix(keys + stream).unsqueeze(1) + numbers * GOLDEN)
    return (_shift_right(bits, 40).to(dtype) * 2.0**-24).view(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, stream: int = 0) -> Tensor:
    """(B, *shape) standard normal, by Box and Muller from two uniform numbers, of the streams
    ``stream`` and ``stream + 1``."""
    radius = (-2 * torch.log1p(-uniform(keys, shape, dtype, stream))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(keys, shape, dtype, stream + 1))


def mix(z: Tensor) -> Tensor:
    """int64 of any shape: the output of SplitMix64 in state ``z``; other states give unrelated
    numbers."""
    z = z + GOLDEN
    z = (z ^ _shift_right(z, 30)) * MIX1
    z = (z ^ _shift_right(z, 27)) * MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """The logical shift of a signed tensor: the copies of the sign bit are masked away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """Any int as a signed 64-bit one, modulo 2⁶⁴."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
