"""The gradient of a batch from those of its parts, whichever process takes which part."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ironmoe.moe.exchange.group import Group
from ironmoe.moe.parallel.buckets import buckets
from ironmoe.moe.parallel.copies import copies
from ironmoe.moe.parallel.together import number_of_processes
from ironmoe.moe.sharded import local_values


class MeanGradients:
    """The mean of the gradients of the parts of a batch.

    Sums are in float64 and rounded once. A float32 gradient then does not depend on the order of
    the parts, except where a sum lies on the edge between two float32 numbers, so processes train
    to the bits of one process. In float32 the last bit would differ, and after some steps the sign
    of an image's gradient that is nearly 0, and then losses.

    FSDP2 averages over processes itself, in each backward pass, here in float64 as well. Experts
    that are shared out have the gradients of the parts of all processes that share them.
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
        gradient anywhere gets none. In several processes the host waits for the device once for
        each kind of weights, to learn which these are.
        """
        ranks_of = copies(self.model) if number_of_processes() > 1 else {}
        of_ranks: dict[Group | None, list[nn.Parameter]] = {}
        for weight in weights:
            of_ranks.setdefault(ranks_of.get(weight), []).append(weight)

        for ranks, chosen in of_ranks.items():
            if ranks is None:
                for weight in chosen:
                    if weight in self._sums:
                        weight.grad = _mean(self._sums[weight], self._parts, weight)
            else:
                self._put_of_ranks(chosen, ranks)

    def _put_of_ranks(self, weights: list[nn.Parameter], ranks: Group) -> None:
        """The same for weights of which all these ranks have copies."""
        weights = _with_gradient_anywhere(weights, self._sums, ranks)
        own = (self._sums[w] if w in self._sums else torch.zeros_like(w) for w in weights)
        sums = _summed(map(local_values, own), ranks)
        for weight, total in zip(weights, sums, strict=True):
            mean = _mean(total, self._parts * ranks.size, weight)
            weight.grad = _placed(mean, weight)


def _mean(total: Tensor, parts: int, weight: nn.Parameter) -> Tensor:
    mean = total if parts == 1 else total.double() / parts
    return mean.to(weight.dtype)


def _placed(local: Tensor, weight: nn.Parameter) -> Tensor:
    """What this process holds of a gradient, as the gradient of the weight."""
    if not isinstance(weight, DTensor):
        return local
    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _with_gradient_anywhere(
    weights: list[nn.Parameter], gradients: dict[nn.Parameter, Tensor], ranks: Group
) -> list[nn.Parameter]:
    """Those of the weights that have a gradient on some rank."""
    here = torch.tensor([weight in gradients for weight in weights], dtype=torch.int32)
    there = here.to(local_values(weights[0]).device)
    ranks.sum(there)
    return [weight for weight, number in zip(weights, there.tolist(), strict=True) if number]


def _summed(tensors: Iterable[Tensor], ranks: Group) -> Iterator[Tensor]:
    """The sums over ranks, in float64; many tensors travel together."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.flatten().double() for tensor in bucket])
        ranks.sum(flat)
        pieces = flat.split([tensor.numel() for tensor in bucket])
        yield from (piece.view_as(t) for piece, t in zip(pieces, bucket, strict=True))
