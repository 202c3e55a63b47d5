"""Small kernels for tests of the emulator.

As a script it compiles them, and prints their PTX and what their launch needs as JSON.

It runs in a process of its own, because tests import Triton with interpreted kernels.
"""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

BLOCK = 64  # rows, columns and terms of a step


@triton.jit
def product_kernel(x, w, out, K, BLOCK: tl.constexpr):
    """out (rows, BLOCK) = x (rows, K) w (K, BLOCK): float16 factors by pointers, float32 sums.

    A program has BLOCK rows.
    """
    first = tl.program_id(0) * BLOCK
    i_B = tl.arange(0, BLOCK)
    sum_BB = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, BLOCK):
        x_BB = tl.load(x + (first + i_B)[:, None] * K + k + i_B[None, :])
        w_BB = tl.load(w + (k + i_B)[:, None] * BLOCK + i_B[None, :])
        sum_BB = tl.dot(x_BB, w_BB, sum_BB)
    tl.store(out + (first + i_B)[:, None] * BLOCK + i_B[None, :], sum_BB)


@triton.jit
def boxes_kernel(x, w, out, K, BLOCK: tl.constexpr):
    """The same through descriptors of all three, with a float16 result."""
    first = tl.program_id(0) * BLOCK
    sum_BB = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, BLOCK):
        sum_BB = tl.dot(x.load([first, k]), w.load([k, 0]), sum_BB)
    out.store([first, 0], sum_BB.to(tl.float16))


@triton.jit
def sums_kernel(x, out, BLOCK: tl.constexpr):
    """out[p] = Σ of the program's BLOCK numbers, by several warps."""
    values_B = tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(values_B, 0))


DESCRIBED = f"tensordesc<fp16[{BLOCK},{BLOCK}]>"
SAMPLES = {  # name: kernel, chip, signature, constants
    "product": (
        product_kernel,
        80,
        {"x": "*fp16", "w": "*fp16", "out": "*fp32", "K": "i32"},
        {"BLOCK": BLOCK},
    ),
    "boxes": (
        boxes_kernel,
        90,
        {"x": DESCRIBED, "w": DESCRIBED, "out": DESCRIBED, "K": "i32"},
        {"BLOCK": BLOCK},
    ),
    "sums": (sums_kernel, 80, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 512}),
}


def compiled(name: str) -> dict[str, object]:
    """The text of one sample, its bytes of shared memory, and the boxes of its descriptors."""
    kernel, chip, signature, constants = SAMPLES[name]
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if not kind.startswith("tensordesc")
    }
    source = ASTSource(
        kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    result = triton.compile(
        source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4, "num_stages": 3}
    )
    boxes = [
        meta if isinstance(meta, dict) else vars(meta)
        for meta in getattr(result.metadata, "tensordesc_meta", None) or []
    ]
    return {
        "text": result.asm["ptx"],
        "shared": result.metadata.shared,
        "boxes": [[list(meta["block_size"]), int(meta["swizzle"])] for meta in boxes],
    }


if __name__ == "__main__":
    CUDABackend.make_cubin = lambda self, source, *_: source.encode()
    print(json.dumps({name: compiled(name) for name in SAMPLES}))
