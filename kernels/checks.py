"""What the tensors of experts must be: the errors that name the one which is not."""

from torch import Tensor

from ironmoe.kernels.route import holds_its_numbers


def check_experts(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_name: str, bias_name: str
) -> None:
    """ValueError that names the argument which does not fit: x must be (R, D), weight (E, N, D) and
    bias (E, N), of one dtype and on one device."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be a float matrix of rows (·, D), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if weight.ndim != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"{weight_name} must have shape (E, ·, {x.shape[1]}) to match x, got "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"{bias_name} must have shape {tuple(weight.shape[:2])} to match {weight_name}, got "
            f"{tuple(bias.shape)}"
        )
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None:
            check_like(x, tensor, name)


def check_like(x: Tensor, tensor: Tensor, name: str) -> None:
    """ValueError unless the tensor of this name is of the dtype of x, lies on its device and holds
    numbers that a kernel can read."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
        )
    if not holds_its_numbers(tensor):
        raise ValueError(
            f"{name} must be a dense tensor with numbers of its dtype in its own memory, got a "
            f"{type(tensor).__name__} ({tensor.layout}). Pass what it stands for: a quantised "
            "weight dequantised, the local part of a DTensor"
        )
