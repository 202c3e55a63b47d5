"""The windows of the Square attack (arXiv 1912.00049): how large they are, where they lie, and the
pattern that the moves in L2 and L1 lay into them.

Attempts are at different steps, so each has a window of its own size, and a window is built by
comparing coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Plane = tuple[int, int]  # height and width of the image
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # proposals, of whatever steps


class Window(NamedTuple):
    """Rectangles, one an entry: int64 tensors of one shape."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def share_of_image(step: Tensor, p_init: float) -> Tensor:
    """The share of the image, float64, that the window of proposal number ``step`` (from 0)
    covers."""
    # One comparison each: a tensor of constants would make the host wait.
    halvings = torch.stack([step > after for after in HALVED_AFTER]).sum(0)
    return p_init * torch.exp2(-halvings.double())


def extent_of(free: Tensor) -> Tensor:
    """(R, 4) int64: top, left, height and width of the smallest rectangle around all elements that
    may move, of planes (R, C, H, W) bool. Where there are none it is the first pixel."""
    sides = []
    for axis in (2, 3):
        used = free.any(1).any(4 - axis)  # (R, H) or (R, W)
        first = used.to(torch.int8).argmax(1)
        last = used.shape[1] - 1 - used.flip(1).to(torch.int8).argmax(1)
        length = torch.where(used.any(1), last - first, 0) + 1
        sides.append((first, length))
    return torch.stack([sides[0][0], sides[1][0], sides[0][1], sides[1][1]], 1)


def draw_windows(
    places: Tensor, share: Tensor, plane: Plane, odd: bool, extent: Tensor | None = None
) -> Window:
    """Windows of one shape (…) that cover ``share`` (…) of the plane, placed by uniform numbers
    ``places`` (…, 2).

    They are squares where these fit; in a plane that is too low or too narrow for the square,
    rectangles of the same area. With ``odd`` sides are odd and at least 3, as the moves in L2 and
    L1 want them.

    With ``extent`` (R, 4) of R attempts, of which ``share`` (R, …) has rows, windows lie there and
    their shares are shares of it.

    All places are possible; the official code never takes the last row and the last column. On
    small images that costs it many successes, but where the margin of an image is empty, as in
    MNIST, it saves steps.
    """
    height, width = plane if extent is None else extent[:, 2:].unsqueeze(2).unbind(1)
    area = share * (height * width)
    side = area.sqrt().round().clamp_min(3 if odd else 1)
    if odd:
        side = side + (side % 2 == 0)

    tall = torch.where(side > width, (area / width).round().maximum(side), side)
    tall = tall.clamp_max(height).long()
    wide = torch.where(side > height, (area / height).round().maximum(side), side)
    wide = wide.clamp_max(width).long()

    top = (places[..., 0] * (height + 1 - tall)).long()
    left = (places[..., 1] * (width + 1 - wide)).long()
    if extent is not None:
        top = top + extent[:, :1]
        left = left + extent[:, 1:2]
    return Window(top, left, tall, wide)


def covered(window: Window, plane: Plane) -> Tensor:
    """(…, H, W) bool: the pixels in windows (…)."""
    height, width = plane
    row = torch.arange(height, device=window.top.device) - window.top.unsqueeze(-1)
    column = torch.arange(width, device=window.left.device) - window.left.unsqueeze(-1)
    tall = (row >= 0) & (row < window.height.unsqueeze(-1))
    wide = (column >= 0) & (column < window.width.unsqueeze(-1))
    return tall.unsqueeze(-1) & wide.unsqueeze(-2)


def counted(pixels: Tensor, window: Window) -> Tensor:
    """(R, K, C): how many of the pixels (R, C, H, W) bool are set in each of K windows (R, K), by a
    summed-area table."""
    channels = pixels.shape[1]
    width = pixels.shape[3]
    sums = pixels.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)
    sums = torch.nn.functional.pad(sums, (1, 0, 1, 0)).flatten(2)

    def up_to(row: Tensor, column: Tensor) -> Tensor:
        corner = (row * (width + 1) + column).unsqueeze(1).expand(-1, channels, -1)
        return sums.gather(2, corner)

    bottom = window.top + window.height
    right = window.left + window.width
    inside = (
        up_to(bottom, right)
        - up_to(window.top, right)
        - up_to(bottom, window.left)
        + up_to(window.top, window.left)
    )
    return inside.transpose(1, 2)


def two_bumps(
    window: Window, turned: Tensor, plane: Plane, order: int, dtype: torch.dtype
) -> Tensor:
    """(R, H, W): a bump upwards and one downwards, each in one half of the window (R,), together of
    length 1 in the norm of ``order``.

    The halves lie above each other; where ``turned`` (R,) is set, side by side. A bump of
    half-length n has the value Σ 1 / k^(4 / order) over k = d + 1 … n + 1 at Chebyshev distance d
    of its centre, and both have the same norm. This is η of section 4.2 of arXiv 1912.00049 (order
    2), with steeper bumps in L1 as in the code of arXiv 2103.01208 (order 1).
    """
    # Distances to the centre of the pixel's own half, and the half-length of that half.
    down = _halves(window.top, window.height, ~turned, plane[0])
    across = _halves(window.left, window.width, turned, plane[1])
    distance, reach = (torch.maximum(down[i].unsqueeze(2), across[i].unsqueeze(1)) for i in (0, 1))

    terms = torch.arange(1, max(plane) // 2 + 2, device=distance.device, dtype=torch.float64) ** (
        -4 / order
    )
    sums = torch.nn.functional.pad(terms.cumsum(0), (1, 0)).to(dtype)

    later = down[2].unsqueeze(2) & across[2].unsqueeze(1)
    bumps = (sums[reach + 1] - sums[distance.minimum(reach + 1)]) * covered(window, plane)
    lengths = torch.linalg.vector_norm(
        torch.stack([bumps * ~later, bumps * later]), order, (2, 3), keepdim=True
    )

    # A window that is one pixel high has but one half.
    halves = (lengths > 0).to(dtype).sum(0) ** (1 / order)
    lengths = lengths.clamp_min(torch.finfo(dtype).tiny)
    return bumps / (torch.where(later, -lengths[1], lengths[0]) * halves)


def _halves(
    start: Tensor, length: Tensor, split: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis of ``size`` pixels, each (R, size): distance to the centre of the half,
    half-length of the half, whether it is the second half. All is the second half where the windows
    are not ``split`` along this axis."""
    start = start.unsqueeze(1)
    length = length.unsqueeze(1)
    first = length // 2 * split.unsqueeze(1)
    place = torch.arange(size, device=start.device) - start
    later = place >= first
    reach = torch.where(later, length - first, first) // 2
    return (place - torch.where(later, first, 0) - reach).abs(), reach, later
