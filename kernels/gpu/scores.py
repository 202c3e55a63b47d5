"""The scores of ``ironmoe.kernels.scores`` inside a kernel, in float32.

Of a joint score the kernel computes parts first, exp(z − top), and divides them by their sum later;
another score is its own part. R rows of logits a program; C columns or K choices: the last axis.
"""

import triton
import triton.language as tl

from ironmoe.kernels.gpu.floats import TINY
from ironmoe.kernels.scores import SCORES

UNKNOWN = tl.constexpr(f"SCORE must be one of {tuple(SCORES)}")


@triton.jit
def score_parts(z, SCORE: tl.constexpr):
    """(largest logit of each row, ``score_part``, its sum): a softmax is part / sum."""
    top = tl.max(z, 1, keep_dims=True)
    part = score_part(z, top, SCORE)
    return top, part, tl.sum(part, 1, keep_dims=True)


@triton.jit
def score_part(z, top, SCORE: tl.constexpr):
    """The score of each logit; of a softmax what its sum is still to divide."""
    if SCORE == "softmax":
        return tl.exp(z - top)
    elif SCORE == "sigmoid":
        return tl.sigmoid(z)
    elif SCORE == "sqrtsoftplus":
        e = tl.exp(-tl.abs(z))
        u = 1 + e
        # log1p(e): log(u) / (u - 1) errs in u and in log(u) alike, and the two errors cancel.
        log1p = tl.where(u == 1, e, e * (tl.log(u) / (u - 1)))
        return tl.sqrt_rn(tl.maximum(z, 0.0) + log1p)
    else:
        tl.static_assert(False, UNKNOWN)
        return z


@triton.jit
def score_backward(d_score, z, score, SCORE: tl.constexpr):
    """The gradient of each logit from that of its score; for scores that are not joint."""
    if SCORE == "sigmoid":
        return d_score * score * (1 - score)
    elif SCORE == "sqrtsoftplus":
        return d_score * tl.sigmoid(z) / (2 * tl.maximum(score, TINY))
    else:
        tl.static_assert(False, UNKNOWN)
        return d_score
