"""One step of projected gradient ascent (Madry et al., arXiv 1706.06083), from the gradient to the
next image in one pass.

The image is kept in at least float32, the fp32 master, and the model gets a rounded copy: a step of
eps/40 at eps = 1/255 would leave 97 % of bfloat16 pixels unchanged. ``ironmoe.attacks.balls``
takes its maths from here. B is the number of examples.
"""

from typing import Any

import torch
from torch import Tensor

from ironmoe.kernels.route import may_look, takes_operators, takes_triton
from ironmoe.kernels.types import MAX_PROJECTION_ROUNDS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def linf_step(
    point: Tensor,
    grad: Tensor,
    low: Tensor,
    high: Tensor,
    alpha: Tensor,
    *,
    image_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """clamp(point + alpha · sign(grad), low, high), in the dtype of ``point``, and the same as an
    image for the model.

    Args:
        point: (B, …) float32 or float64, the master.
        grad: (B, …) any float dtype: the loss's gradient, in the model's dtype. NaN counts as 0.
        low, high: (B, …) in the dtype of ``point``: the Linf ball inside the image box.
        alpha: (B,) any float dtype, the step length of each example.
        image_dtype: of the image; None is the dtype of ``point``.

    Returns:
        (point', image), both (B, …), outside autograd; the image is ``point'`` itself where the
        dtypes agree.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than the above.
    """
    _check(point, grad, {"low": low, "high": high}, {"alpha": alpha}, image_dtype)
    image_dtype = image_dtype or point.dtype
    if takes_operators(point):
        moved, image = _linf_operator(point, grad, low, high, alpha, image_dtype)
        return moved, moved if image_dtype == point.dtype else image
    moved = _linf_twin(point, grad, low, high, alpha)
    return moved, moved.to(image_dtype)


@torch.no_grad()
def l2_step(
    point: Tensor,
    grad: Tensor,
    center: Tensor,
    eps: Tensor,
    bounds: tuple[float, float],
    alpha: Tensor,
    *,
    image_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """point + alpha · grad / ‖grad‖, projected exactly onto the L2 ball inside the image box; and
    the same as an image.

    A zero gradient leaves the point. A gradient with NaN or infinity makes its example NaN.

    Args:
        point: (B, …) float32 or float64, the master.
        grad: (B, …) any float dtype: the loss's gradient, in the model's dtype.
        center: (B, …) in the dtype of ``point``, inside ``bounds``.
        eps, alpha: (B,) any float dtype, radius and step length of each example.
        bounds: lowest and highest valid pixel.
        image_dtype: of the image; None is the dtype of ``point``.

    Returns:
        (point', image), both (B, …), outside autograd; the image is ``point'`` itself where the
        dtypes agree.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than the above, or bounds not
            (lowest, highest).
    """
    _check(point, grad, {"center": center}, {"eps": eps, "alpha": alpha}, image_dtype)
    if not len(bounds) == 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (lowest, highest) with lowest < highest, got {bounds}")
    image_dtype = image_dtype or point.dtype
    if takes_operators(point):
        moved, image = _l2_operator(
            point,
            grad,
            center,
            eps,
            lowest=float(bounds[0]),
            highest=float(bounds[1]),
            alpha=alpha,
            image_dtype=image_dtype,
        )
        return moved, moved if image_dtype == point.dtype else image
    moved = _l2_twin(point, grad, center, eps, bounds, alpha)
    return moved, moved.to(image_dtype)


def linf_ascent(point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
    """The step of Linf length ``alpha`` (B,) that raises a linear loss the most."""
    return point + column(alpha, point) * grad.sign().to(point.dtype)


def l2_ascent(point: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
    """The step of L2 length ``alpha`` (B,) that raises a linear loss the most."""
    # Divided by the largest entry first: the squares of a confident model's gradients, which are
    # small, would underflow.
    grad = grad.to(torch.promote_types(grad.dtype, point.dtype))
    peak = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
    grad = grad / column(peak, grad)
    norm = grad.flatten(1).norm(dim=1).clamp_min(1e-12)
    return point + column(alpha / norm, point) * grad.to(point.dtype)


def l2_projection(
    point: Tensor,
    center: Tensor,
    eps: Tensor,
    bounds: tuple[Any, Any],
) -> Tensor:
    """The nearest point of the L2 ball (center, eps (B,)) inside the box ``bounds``: two numbers
    or, where the points are (B, D), two tensors (B, D).

    The projection of y = x + d onto both is z = clamp(x + s·d) for the largest s ≤ 1 with ‖z − x‖ ≤
    eps (the KKT conditions; the box only clips coordinates). ‖z − x‖² is the sum of s²d² over the
    free coordinates and of room² over the clipped ones. So s follows from the set of clipped
    coordinates. This set only grows, and a few rounds reach the exact answer.
    """
    delta = (point - center).flatten(1)
    flat_center = center.flatten(1)
    room = torch.where(delta > 0, bounds[1] - flat_center, flat_center - bounds[0])
    size = delta.abs()
    eps = eps.to(delta.dtype)

    s = (eps / size.norm(dim=1).clamp_min(1e-30)).clamp_max(1)
    for _ in range(MAX_PROJECTION_ROUNDS):
        clipped = s.unsqueeze(1) * size >= room
        spent = room.masked_fill(~clipped, 0).square().sum(1)
        free = size.masked_fill(clipped, 0).square().sum(1)
        left = (eps.square() - spent).clamp_min(0)
        larger = (left / free.clamp_min(1e-30)).sqrt().clamp_max(1).maximum(s)
        if may_look(s) and torch.equal(larger, s):  # further rounds would change nothing
            break
        s = larger

    return (center + column(s, center) * delta.view_as(center)).clamp(*bounds)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to multiply the batch ``like`` (B, …), in its dtype."""
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _linf_twin(point: Tensor, grad: Tensor, low: Tensor, high: Tensor, alpha: Tensor) -> Tensor:
    return linf_ascent(point, grad, alpha).clamp(low, high)


def _l2_twin(
    point: Tensor,
    grad: Tensor,
    center: Tensor,
    eps: Tensor,
    bounds: tuple[float, float],
    alpha: Tensor,
) -> Tensor:
    return l2_projection(l2_ascent(point, grad, alpha), center, eps, bounds)


def _outputs(point: Tensor, image_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty (point', image). An operator may not return one tensor twice, so an image in the dtype
    of ``point`` has no elements."""
    image_shape = (0,) if image_dtype == point.dtype else point.shape
    return point.new_empty(point.shape), point.new_empty(image_shape, dtype=image_dtype)


def _filled(outputs: tuple[Tensor, Tensor], result: Tensor) -> tuple[Tensor, Tensor]:
    """Copies ``result`` into both outputs, as the kernels do."""
    moved, image = outputs
    moved.copy_(result)
    if image.numel():
        image.copy_(result)
    return outputs


@torch.library.custom_op("ironmoe::linf_step", mutates_args=())
def _linf_operator(
    point: Tensor, grad: Tensor, low: Tensor, high: Tensor, alpha: Tensor, image_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    outputs = _outputs(point, image_dtype)
    if not takes_triton(point) or not takes_triton(grad):
        return _filled(outputs, _linf_twin(point, grad, low, high, alpha))
    from ironmoe.kernels.gpu.attack_step import launch_linf_step

    moved, image = outputs
    launch_linf_step(point, grad, low, high, alpha, moved=moved, image=image)
    return outputs


@torch.library.custom_op("ironmoe::l2_step", mutates_args=())
def _l2_operator(
    point: Tensor,
    grad: Tensor,
    center: Tensor,
    eps: Tensor,
    lowest: float,
    highest: float,
    alpha: Tensor,
    image_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    outputs = _outputs(point, image_dtype)
    if not takes_triton(point) or not takes_triton(grad):
        return _filled(outputs, _l2_twin(point, grad, center, eps, (lowest, highest), alpha))
    from ironmoe.kernels.gpu.attack_step import launch_l2_step

    moved, image = outputs
    launch_l2_step(point, grad, center, eps, (lowest, highest), alpha, moved=moved, image=image)
    return outputs


@_linf_operator.register_fake
@_l2_operator.register_fake
def _fake(point: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _outputs(point, image_dtype=arguments[-1])


def _check(
    point: Tensor,
    grad: Tensor,
    likes: dict[str, Tensor],
    columns: dict[str, Tensor],
    image_dtype: torch.dtype | None,
) -> None:
    """TypeError or ValueError that names the argument which does not fit.

    likes: must have the shape, dtype and device of ``point``. columns: must hold one value for each
    example.
    """
    if (
        not isinstance(point, Tensor)
        or point.dtype not in (torch.float32, torch.float64)
        or point.ndim < 2
    ):
        raise TypeError(f"point must be a float32 or float64 tensor (B, …), got {_describe(point)}")
    wanted: dict[str, tuple[Tensor, torch.Size, tuple[torch.dtype, ...]]] = {
        "grad": (grad, point.shape, FLOATS)
    }
    wanted |= {name: (tensor, point.shape, (point.dtype,)) for name, tensor in likes.items()}
    wanted |= {name: (tensor, point.shape[:1], FLOATS) for name, tensor in columns.items()}
    for name, (tensor, shape, dtypes) in wanted.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            raise TypeError(
                f"{name} must be a tensor of {' or '.join(map(str, dtypes))}, got "
                f"{_describe(tensor)}"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)}, as point has {tuple(point.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != point.device:
            raise ValueError(f"{name} must be on {point.device} like point, got {tensor.device}")
    if image_dtype is not None and image_dtype not in FLOATS:
        raise TypeError(f"image_dtype must be None or one of {FLOATS}, got {image_dtype!r}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return repr(value)
