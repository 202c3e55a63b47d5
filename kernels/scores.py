"""Scores of a router: value and derivative. A new one is an entry here and its lines in
``ironmoe.kernels.gpu.scores``.

All of them run along the last axis, E experts or the K chosen ones, in at least float32. Both
directions use differentiable operations, so derivatives of any order follow.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels.autograd.softmax import softmax


class Score(NamedTuple):
    """``value(z)`` and ``backward(d_score, z)`` of logits z; the other fields tell the Triton
    kernel what it may rely on.

    joint: the score of an expert depends on the logits of the others, and so does its gradient.
    nonnegative: no score is below 0, so that float32 bits compare like scores.
    """

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    joint: bool = False
    nonnegative: bool = True


def _softmax(z: Tensor) -> Tensor:
    return softmax(z, -1)


def _softmax_backward(d_score: Tensor, z: Tensor) -> Tensor:
    value = _softmax(z)
    return value * (d_score - (d_score * value).sum(-1, keepdim=True))


def _sigmoid_backward(d_score: Tensor, z: Tensor) -> Tensor:
    value = z.sigmoid()
    return d_score * value * (1 - value)


def _sqrtsoftplus(z: Tensor) -> Tensor:
    return torch.nn.functional.softplus(z).sqrt()


def _sqrtsoftplus_backward(d_score: Tensor, z: Tensor) -> Tensor:
    return d_score * z.sigmoid() / (2 * _sqrtsoftplus(z))


SCORES = {
    "softmax": Score(_softmax, _softmax_backward, joint=True),
    "sigmoid": Score(torch.sigmoid, _sigmoid_backward),
    "sqrtsoftplus": Score(_sqrtsoftplus, _sqrtsoftplus_backward),  # DeepSeek-V4's
}


def get_score(name: str) -> Score:
    """The score called ``name``. ValueError names the known ones."""
    if not isinstance(name, str) or name not in SCORES:
        raise ValueError(f"score must be one of {tuple(SCORES)}, got {name!r}")
    return SCORES[name]
