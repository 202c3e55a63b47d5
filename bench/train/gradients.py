"""The gradient of a batch from those of its parts, whichever process takes which part."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ironmoe.bench.train.parallel import mean_over_processes, number_of_processes
from ironmoe.moe.sharded import is_sharded

BUCKET = 2**24  # how many numbers travel at once


class MeanGradients:
    """The mean of the gradients of the parts of a batch.

    Sums are in float64 and rounded once. A float32 gradient then does not depend on the order of
    the parts, except where a sum lies on the edge between two float32 numbers, so processes train
    to the bits of one process. In float32 the last bit would differ, and after some steps the sign
    of an image's gradient that is nearly 0, and then losses.

    FSDP2 averages over processes itself, in each backward pass, here in float64 as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._parts = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients of the loss of a part away from the weights."""
        self._parts += 1
        for weight in self.model.parameters():
            grad, weight.grad = weight.grad, None
            if grad is not None:
                earlier = self._sums.get(weight)
                self._sums[weight] = grad if earlier is None else earlier.double() + grad

    @torch.no_grad()
    def put(self, weights: Iterable[nn.Parameter]) -> None:
        """Give these weights the mean gradient of all parts in all processes, each of which must
        call it after as many parts.

        A weight that has a gradient in some processes only has 0 in the others; one without a
        gradient anywhere gets none. In several processes the host waits for the device once, to
        learn which these are.
        """
        weights, parts = list(weights), self._parts
        exchanges = number_of_processes() > 1 and not is_sharded(self.model)
        if exchanges:
            parts *= number_of_processes()
            weights = _with_gradient_anywhere(weights, self._sums)
            sums = _summed(
                self._sums[w] if w in self._sums else torch.zeros_like(w) for w in weights
            )
        else:
            weights = [weight for weight in weights if weight in self._sums]
            sums = (self._sums[weight] for weight in weights)

        for weight, total in zip(weights, sums, strict=True):
            weight.grad = total if parts == 1 else (total.double() / parts).to(weight.dtype)


@torch.no_grad()
def _with_gradient_anywhere(
    weights: list[nn.Parameter], gradients: dict[nn.Parameter, Tensor]
) -> list[nn.Parameter]:
    """Those of the weights that have a gradient in some process."""
    if not weights:
        return []
    here = torch.tensor([float(weight in gradients) for weight in weights])
    shares = mean_over_processes(here.to(weights[0].device)).tolist()
    return [weight for weight, share in zip(weights, shares, strict=True) if share]


def _summed(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The sums over the processes, in float64; many tensors travel together."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten().double() for tensor in bucket])
        dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in bucket])
        yield from (piece.view_as(t) for piece, t in zip(pieces, bucket, strict=True))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float) -> Tensor:
    """Scale the gradients so that their L2 norm, of all together, is at most ``norm``. Under FSDP2
    it is that of the whole gradients, of which this process has a part.

    The norm is summed in float64: its float32 value, by which gradients are scaled, then does not
    depend on how they are shared out, and FSDP2 trains to the bits of data parallel.

    Returns:
        () float64, the norm before; the same in every process.
    """
    given = [p.grad for p in model.parameters() if p.grad is not None]
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in given]
    if not own:
        return torch.zeros((), dtype=torch.float64)

    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in own]
    square = torch.stack(norms).square().sum()
    if is_sharded(model):
        dist.all_reduce(square)
    total = square.sqrt()

    factor = (norm / (total + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for grad in own:
        grad.mul_(factor.to(grad.dtype))
    return total
