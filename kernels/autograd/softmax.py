"""Softmax and its relatives, in forward mode too.

torch's forward-mode formula of all three changes in place what its own backward pass would read, so
that a gradient through ``torch.autograd.forward_ad`` is an error. There they are written out.
"""

import torch
from torch import Tensor

from ironmoe.kernels.route import forward_mode


def softmax(z: Tensor, dim: int) -> Tensor:
    """``z.softmax(dim)``, to the last bit outside forward mode."""
    if not _written_out():
        return z.softmax(dim)
    powers = (z - _largest(z, dim)).exp()
    return powers / powers.sum(dim, keepdim=True)


def log_softmax(z: Tensor, dim: int) -> Tensor:
    """``z.log_softmax(dim)``, to the last bit outside forward mode."""
    return z - logsumexp(z, dim, keepdim=True) if _written_out() else z.log_softmax(dim)


def logsumexp(z: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """``z.logsumexp(dim)``, to the last bit outside forward mode; z must be finite there."""
    if not _written_out():
        return z.logsumexp(dim, keepdim)
    largest = _largest(z, dim)
    sums = (z - largest).exp().sum(dim, keepdim=True).log() + largest
    return sums if keepdim else sums.squeeze(dim)


def _written_out() -> bool:
    return not torch.compiler.is_compiling() and forward_mode()


def _largest(z: Tensor, dim: int) -> Tensor:
    """What is taken off before exp, so that nothing overflows. No derivative depends on it."""
    return z.detach().amax(dim, keepdim=True)
