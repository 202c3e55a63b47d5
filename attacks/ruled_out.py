"""Which classes a model rules out, so that no change of the image brings them near the top.

Models mark such classes with logits of −1e9, of the lowest number of a dtype, or of −∞.
"""

import torch
from torch import Tensor

# A class is ruled out if its logit lies so many times the size of the highest logit below it (or so
# far, where the highest is smaller than 1). float32 has 24 bits: 20 bits below the top the highest
# logits change and their distance to such a class hardly does. Logits that are merely large, such
# as those of a model whose logits are multiplied by 10⁴, come nowhere near.
BEYOND = 2.0**20
# Half precision has no number that far below; there the lowest one marks such a class.
LOWEST_HALF = torch.finfo(torch.float16).min


def ruled_out(logits: Tensor) -> Tensor:
    """(B, C) bool: the classes of logits (B, C) that are −∞ or −65504, the lowest number of half
    precision, or lie more than 2²⁰ · max(1, |z₁|) below the highest logit z₁."""
    return too_far_below(logits, logits.amax(1, keepdim=True))


def too_far_below(logits: Tensor, highest: Tensor) -> Tensor:
    """bool: which logits are ruled out beside these ``highest`` ones, of a shape that broadcasts
    with theirs."""
    far = highest - BEYOND * highest.abs().clamp_min(1)
    return (logits < far) | (logits == float("-inf")) | (logits == LOWEST_HALF)
