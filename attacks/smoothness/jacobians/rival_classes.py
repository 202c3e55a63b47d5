"""Which classes are looked at for the first-order radius, and whether others can be nearer.

Shape suffixes: B images, C classes.
"""

import math

import torch
from torch import Tensor


class Rivals:
    """The other classes of B images, by rising margin, and the slopes that are known so far.

    margins:   (B, C) float64 z_y − z_j
    slopes:    (B, C) float64, of the margins; NaN of classes that were not looked at, 0 of y
    following: (B, C) int64, the classes by rising margin, y last
    steepest:  (B,) float64, what no slope exceeds; inf where nothing is known
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        wide = logits.detach().double()
        self.labels = labels
        self.margins = wide.gather(1, labels[:, None]) - wide
        self.slopes = torch.full_like(wide, math.nan).scatter(1, labels[:, None], 0.0)
        others = self.margins.scatter(1, labels[:, None], math.inf)
        self.following = others.argsort(dim=1, stable=True)
        self.steepest = torch.full_like(wide[:, 0], math.inf)

    def add(self, rivals: Tensor, slopes: Tensor, looked_at: Tensor) -> None:
        """The slope of one class (B,) of each image that was looked at (B,) bool. The rows of the
        others came along, and must not depend on who else is in the batch."""
        known = self.slopes.scatter(1, rivals[:, None], slopes[:, None])
        self.slopes = torch.where(looked_at[:, None], known, self.slopes)

    @property
    def count(self) -> Tensor:
        """(B,) int64, of how many other classes the slopes are known."""
        return (~self.slopes.isnan()).sum(1) - 1

    @property
    def radius(self) -> Tensor:
        """(B,) float64, the least margin over slope of the classes that were looked at."""
        # of classes without a slope: it is 0, or they were not looked at
        ahead = torch.where((self.margins > 0) | self.slopes.isnan(), math.inf, 0.0)
        distances = torch.where(self.slopes > 0, self.margins / self.slopes, ahead).clamp_min(0)
        return distances.scatter(1, self.labels[:, None], math.inf).amin(1)

    @property
    def settled(self) -> Tensor:
        """(B,) bool: no class that was not looked at can have a smaller radius."""
        missing = self.margins.masked_fill(~self.slopes.isnan(), math.inf).amin(1)
        nearest = torch.where(self.steepest > 0, missing / self.steepest, math.inf).clamp_min(0)
        return missing.isinf() | (nearest >= self.radius)
