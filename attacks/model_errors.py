"""What goes wrong when a model is asked, said so that a user knows what to do: it has no gradient,
as a web service or one that computes in numpy, or its weights have another dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ironmoe.moe.exchange.errors import RanksDisagreeError, is_of_exchange
from ironmoe.moe.parallel.lock_step import group_in_step

INSTEAD = "Square and HopSkipJump need no gradient"
LABELS_WILL_DO = "HopSkipJump needs no more than labels"


class NoGradient(ValueError):
    """A gradient was asked for, and the model has none with respect to its images.

    why: a clause that says how it shows
    what, instead: the message, and the advice at its end
    """

    def __init__(self, got: str, *, why: str, instead: str = INSTEAD) -> None:
        self.why = why
        self.instead = instead
        self.what = f"model must be differentiable with respect to its images, got {got}"
        super().__init__(f"{self.what}; {instead}")


def _may_ask_again(error: Exception) -> bool:
    """Whether the model may be asked once more after this error. Not if other processes may wait
    for the rest of the pass, or come to no other one."""
    is_known = isinstance(error, NoGradient | RanksDisagreeError) or is_of_exchange(error)
    return not is_known and group_in_step() is None


def check_not_labels(outputs: Tensor) -> None:
    """NoGradient: the outputs are labels, or other integers."""
    if not outputs.is_floating_point():
        raise NoGradient(
            f"labels alone ({outputs.dtype})",
            why="its outputs are labels",
            instead=LABELS_WILL_DO,
        )


def gradient(loss: Tensor, points: Tensor, mode: str = "") -> Tensor:
    """(R, …) of the summed loss (R,) at the points.

    Raises:
        NoGradient: the loss has no graph, or its graph does not lead to the points; ``mode`` says
            under which routing mode.
    """
    check_graph(loss, mode)
    (grad,) = torch.autograd.grad(loss.sum(), [points], allow_unused=True)
    if grad is None:
        raise _leads_elsewhere(mode)
    return grad


def check_leads_to(loss: Tensor, points: Tensor) -> None:
    """NoGradient: the loss has no graph, or its graph does not lead to the points, which are a
    leaf. Nothing is computed."""
    check_graph(loss)
    seen = {loss.grad_fn}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if getattr(node, "variable", None) is points:
            return
        following = set() if node is None else {each for each, _ in node.next_functions} - seen
        seen |= following
        waiting += following
    raise _leads_elsewhere("")


def _leads_elsewhere(mode: str) -> NoGradient:
    return NoGradient(
        f"logits without a graph that leads to the images{mode}",
        why=f"the graph of its outputs does not lead to the images{mode}",
    )


def check_graph(value: Tensor, mode: str = "") -> None:
    """NoGradient: the value, computed of the model's outputs, has no graph."""
    if not value.requires_grad:
        raise NoGradient(f"logits without a graph{mode}", why=f"its outputs have no graph{mode}")


@contextmanager
def taking_gradients(points: Tensor, ask: Callable[[Tensor], object]) -> Iterator[None]:
    """A block in which the model is asked about points that may require a gradient.

    Raises:
        NoGradient: the block failed. So does ``ask`` for these points, and not for points that
            require none.
    """
    try:
        yield
    except Exception as error:
        is_lack_of_memory = isinstance(error, MemoryError) or "memory" in str(error)
        if not points.requires_grad or is_lack_of_memory or not _may_ask_again(error):
            raise
        if not _answers(ask, points.detach()) or _answers(ask, points):
            raise
        raise NoGradient(
            "logits for images that require no gradient alone. For others it failed with "
            f"{type(error).__name__}: {error}",
            why=f"for images that require one it fails with {type(error).__name__}",
        ) from error


def _answers(ask: Callable[[Tensor], object], points: Tensor) -> bool:
    """Whether the model has an answer for these points, asked once more."""
    try:
        with torch.set_grad_enabled(points.requires_grad):
            ask(points)
    except Exception:
        return False
    return True


@contextmanager
def explaining_dtypes(
    model: object, images: Tensor, *, images_may_change: bool = True
) -> Iterator[None]:
    """A block in which the model is asked about images. images_may_change: whether images of
    another dtype would do.

    Raises:
        TypeError: the block failed over dtypes, and the model's weights have another one than the
            images.
    """
    try:
        yield
    except RuntimeError as error:
        dtype = _dtype_of_weights(model)
        if dtype in (None, images.dtype) or "type" not in str(error):
            raise
        other_images = f"images.to({dtype}) or " * images_may_change
        raise TypeError(
            f"images must have a dtype that the model takes, got {images.dtype} for weights of "
            f"{dtype}: use {other_images}model.to({images.dtype}). The model's error was: {error}"
        ) from error


def _dtype_of_weights(model: object) -> torch.dtype | None:
    """That of the first floating point weight; None without one."""
    if not isinstance(model, nn.Module):
        return None
    return next((w.dtype for w in model.parameters() if w.is_floating_point()), None)
