"""Facts of float32 that several kernels share."""

import triton.language as tl

# A GPU's plain minimum and maximum take the number where the other one is NaN. These keep the NaN,
# as torch does: a diverged layer must not look sound.
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number: keeps 0 out of divisors
