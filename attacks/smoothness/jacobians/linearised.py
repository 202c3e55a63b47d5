"""A model at the images of one batch, and products with its Jacobian.

Shape suffixes: B images, C classes, D pixels of an image.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ironmoe.attacks.model_errors import check_leads_to
from ironmoe.attacks.smoothness.asking import Asked
from ironmoe.attacks.smoothness.routing_held import held_routing


class Linearised:
    """A model at images (B, …): its logits with their graph, which every product walks back again.
    No image's logits depend on another image, so one product serves them all.

    passes: how many forward and backward passes it has cost, those of the routing included
    """

    def __init__(self, asked: Asked, x: Tensor, passes: int = 0) -> None:
        self.point = x.clone().requires_grad_()
        self.logits = asked(self.point)
        check_leads_to(self.logits, self.point)
        self.passes = passes + 1
        self._pullback: tuple[Tensor, Tensor] | None = None

    def transposed(self, weights_BC: Tensor) -> Tensor:
        """(B, …) the gradient of the sum of each image's logits with these weights: Jᵀ u."""
        self.passes += 1
        (grad,) = torch.autograd.grad(
            self.logits, [self.point], weights_BC.to(self.logits), retain_graph=True
        )
        return grad

    def row(self, classes_B: Tensor) -> Tensor:
        """(B, …) the gradient of one logit of each image, its own class (B,) int64."""
        one_hot = torch.zeros_like(self.logits).scatter_(1, classes_B[:, None], 1.0)
        return self.transposed(one_hot)

    def rows(self) -> Tensor:
        """(B, C, …) the gradients of all logits."""
        classes = range(self.logits.shape[1])
        labels = (torch.full_like(self.logits[:, 0], c, dtype=torch.int64) for c in classes)
        return torch.stack([self.row(classes_B) for classes_B in labels], 1)

    def times(self, direction: Tensor) -> Tensor:
        """(B, C) how the logits change along a direction (B, …): J v. It differentiates Jᵀ u, which
        is linear in u, with respect to u; so the model must be differentiable twice."""
        if self._pullback is None:
            weights_BC = torch.zeros_like(self.logits).requires_grad_()
            (pulled,) = torch.autograd.grad(
                self.logits, [self.point], weights_BC, create_graph=True
            )
            self._pullback = weights_BC, pulled
            self.passes += 1

        weights_BC, pulled = self._pullback
        self.passes += 1
        (product,) = torch.autograd.grad(
            pulled, [weights_BC], direction.to(pulled), retain_graph=True
        )
        return product


@contextmanager
def linearised(asked: Asked, x: Tensor, routing: str) -> Iterator[Linearised]:
    """The model at a batch of images; inside the block it routes as ``held_routing`` says. The
    caller is inside ``measuring``."""
    counted = _Counted(asked)
    with held_routing(asked.model, x, routing, counted):
        yield Linearised(asked, x, counted.passes)


@contextmanager
def twice_linearised(asked: Asked, x: Tensor, passes: int) -> Iterator[Linearised]:
    """The model at the same images, with second derivatives. torch's fused kernels for attention
    have none, so attention of any library runs in plain operations inside the block: backward
    passes, too, since activation checkpoints run the forward pass again there."""
    with sdpa_kernel(SDPBackend.MATH):
        yield Linearised(asked, x, passes)


class _Counted:
    """Counts how often the routing that is held asks the model."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.passes = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.asked(x)


def largest_singular_values(rows_BCX: Tensor) -> Tensor:
    """(B,) float64, of matrices (B, C, …), by their Gram matrices C × C."""
    gram = [rows.flatten(1).double() @ rows.flatten(1).double().T for rows in rows_BCX]
    if not gram:
        return rows_BCX.new_zeros(0, dtype=torch.float64)
    return torch.linalg.eigvalsh(torch.stack(gram))[:, -1].clamp_min(0).sqrt()
