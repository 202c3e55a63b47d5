"""What a launch hands to a product: tensors as they are, or TMA descriptors of them. On the host.

Shapes: weights (E, N, K), H is the halves (2, gate and up) of the columns. This file does not know
what is computed.
"""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ironmoe.kernels.tuning import Blocks, Chip


def weight_layout(weight: Tensor, chip: Chip) -> tuple[bool, bool]:
    """(does TMA read them, is K their last axis) for stacked weights (E, N, K) of any strides."""
    k_last = weight.stride(2) == 1
    return chip.tma and takes_tma(weight if k_last else weight.transpose(1, 2)), k_last


def weight_operand(
    weight: Tensor, blocks: Blocks, tma: bool, k_last: bool, *, box: bool = False
) -> Tensor | TensorDescriptor:
    """What the kernel reads. ``box``: the same columns of gate and of up are one box."""
    if not tma:
        return weight
    if box:
        halves_EHNK = weight.unflatten(1, (2, weight.shape[1] // 2))
        if k_last:
            return TensorDescriptor.from_tensor(halves_EHNK, [1, 2, blocks.n, blocks.k])
        return TensorDescriptor.from_tensor(
            halves_EHNK.permute(0, 3, 1, 2), [1, blocks.k, 2, blocks.n]
        )
    if k_last:
        return TensorDescriptor.from_tensor(weight, [1, blocks.n, blocks.k])
    return TensorDescriptor.from_tensor(weight.transpose(1, 2), [1, blocks.k, blocks.n])


def are_aligned(*tensors: Tensor) -> bool:
    """Whether Triton knows that a row starts at an address wide loads can take: it asks for strides
    that are multiples of 16."""
    return all(stride == 1 or stride % 16 == 0 for tensor in tensors for stride in tensor.stride())


def takes_tma(tensor: Tensor) -> bool:
    """Whether the copy engine can address it: 16-byte rows, a contiguous last axis, no empty or
    zero-stride one."""
    aligned = all(
        stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1]
    )
    return aligned and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


def output_box(
    out: Tensor | None, num_halves: int, rows: int, columns: int, chip: Chip
) -> TensorDescriptor | None:
    """``rows`` × ``columns`` of one half of ``out`` (R, num_halves · N). No box reaches beyond its
    half.

    None where TMA does not take ``out``.
    """
    if out is None or not chip.tma:
        return None
    out_RHN = out.unflatten(1, (num_halves, out.shape[1] // num_halves))
    return TensorDescriptor.from_tensor(out_RHN, [rows, 1, columns]) if takes_tma(out_RHN) else None
