"""What the data sheets of GPUs promise: products of dense bfloat16 and bytes of memory a second."""

import re
from typing import NamedTuple

from ironmoe.bench.common.choices import did_you_mean
from ironmoe.bench.common.user_error import UserError
from ironmoe.kernels.tuning import CHIPS, Chip

ALL = "all"


class GpuError(UserError):
    """No GPU has this name; the message says which there are."""


class Rates(NamedTuple):
    """What a GPU does in a second: 10¹² FLOPs of dense bfloat16 products whose sums are float32,
    and 10¹² bytes to and from its memory."""

    tflops: float
    terabytes: float


class Gpu(NamedTuple):
    """name: on the command line; title: with its form; peak: what ``source`` states; reached: by
    large products and copies, where that was measured."""

    name: str
    title: str
    chip: Chip
    peak: Rates
    source: str
    reached: Rates | None = None


# A bf16 product of 8192³, and a copy, as others have measured them.
H100_REACHED = Rates(790.0, 3.0)

# Data sheets of NVIDIA state the rate with sparsity and a footnote: half of it is the dense one.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h100",
            "H100 SXM 80 GB",
            CHIPS["sm_90"],
            Rates(1979 / 2, 3.35),
            "NVIDIA H100 Tensor Core GPU, data sheet, product specifications, column H100 SXM: "
            "bfloat16 1,979 TFLOPS with sparsity, 3.35 TB/s",
            reached=H100_REACHED,
        ),
        Gpu(
            "h200",
            "H200 SXM 141 GB",
            CHIPS["sm_90"],
            Rates(1979 / 2, 4.8),
            "NVIDIA H200 Tensor Core GPU, data sheet, specifications, column H200 SXM: bfloat16 "
            "1,979 TFLOPS with sparsity, 4.8 TB/s",
        ),
        Gpu(
            "b200",
            "B200 of a DGX or HGX B200",
            CHIPS["sm_100"],
            Rates(4500 / 2, 64 / 8),
            "NVIDIA Blackwell Architecture Technical Brief, table of HGX B200, for each GPU: "
            "bfloat16 4.5 PFLOPS with sparsity. NVIDIA DGX B200, data sheet: 64 TB/s of 8 GPUs",
        ),
        Gpu(
            "a100",
            "A100 SXM 80 GB",
            CHIPS["sm_80"],
            Rates(312, 2.039),
            "NVIDIA A100 Tensor Core GPU, data sheet, specifications, column A100 80GB SXM: "
            "bfloat16 312 TFLOPS (624 with sparsity), 2,039 GB/s",
        ),
        Gpu(
            "mi300",
            "MI300X OAM 192 GB",
            CHIPS["gfx942"],
            Rates(1307.4, 5.3),
            "AMD Instinct MI300X Accelerator, data sheet: peak bfloat16 1,307.4 TFLOPS (2,614.9 "
            "with sparsity), 5.3 TB/s",
        ),
        Gpu(
            "rtx4090",
            "GeForce RTX 4090 24 GB",
            CHIPS["sm_89"],
            # with sums in float16, which no layer takes, it does twice as many
            Rates(165.2, 1.008),
            "NVIDIA Ada GPU Architecture, whitepaper, appendix A, table 2: peak BF16 tensor TFLOPS "
            "with FP32 accumulate 165.2 (330.4 with sparsity), 1008 GB/s",
        ),
    )
}
H100 = GPUS["h100"]
OTHER_NAMES = {"mi300x": "mi300", "4090": "rtx4090"}


def select_gpus(names: str) -> tuple[Gpu, ...]:
    """The GPUs named, separated by commas; "all" is every one. Case, spaces and hyphens do not
    count: "RTX 4090" is "rtx4090".

    Raises:
        GpuError: a name is not known.
    """
    wanted: dict[str, Gpu] = {}
    for text in names.split(","):
        plain = re.sub("[^a-z0-9]", "", text.lower())
        name = OTHER_NAMES.get(plain, plain)
        if name == ALL:
            wanted |= GPUS
        elif name in GPUS:
            wanted[name] = GPUS[name]
        else:
            raise GpuError(
                f"--gpu must be names out of {', '.join(GPUS)}, or {ALL}, got {text.strip()!r}"
                f"{did_you_mean(plain, (*GPUS, ALL))}"
            )
    return tuple(wanted.values())


def rates_compared(gpus: tuple[Gpu, ...], *, peak: bool) -> tuple[Rates, ...]:
    """The rates at which limits are taken. One GPU by itself: what it has reached, unless ``peak``
    asks for its data sheet or nothing was measured. Several: their data sheets, so that none has an
    advantage."""
    if len(gpus) == 1 and not peak and gpus[0].reached:
        return (gpus[0].reached,)
    return tuple(gpu.peak for gpu in gpus)
