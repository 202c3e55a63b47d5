"""From pixels to patches: the conv stem, and what a mask over the patches means for pixels."""

import math

from einops import repeat
from torch import Tensor, nn

from ironmoe.moe.routers.masks import checked_mask


def over_patches(mask: Tensor, batch: int, side: int) -> Tensor:
    """The mask of side² patches an image, (B, N) or (B, h, w), as bool (B, h, w)."""
    two_axes = isinstance(mask, Tensor) and mask.ndim == 3
    mask = checked_mask(mask, (batch, side, side) if two_axes else (batch, side * side))
    return mask.reshape(batch, side, side)


def clear_pixels(images: Tensor, mask_Bhw: Tensor, side: int) -> Tensor:
    """images (B, C, H, W) with 0 in every pixel of a patch that the mask (B, h, w) calls padding.
    ``side``: of a patch, in pixels; the last row and column of patches may be cut off."""
    height, width = images.shape[-2:]
    real_B1HW = repeat(mask_Bhw, "b h w -> b 1 (h p) (w q)", p=side, q=side)
    return images.masked_fill(~real_B1HW[..., :height, :width], 0)


class ConvStem(nn.Sequential):
    """Stride-2 3×3 convolutions down to the patch grid, GELU between them; widths double up to
    ``dim``.

    A convolution sees one pixel beyond a patch. Where a mask says that this is padding, it is 0
    before every convolution, as beyond the border of the image.
    """

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        steps = int(math.log2(patch_size))
        widths = [channels, *(max(8, dim >> (steps - 1 - i)) for i in range(steps - 1)), dim]
        layers: list[nn.Module] = []
        for i in range(steps):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.GELU()]
        super().__init__(*layers[:-1])
        self.patch_size = patch_size

    def forward(self, input: Tensor, mask_Bhw: Tensor | None = None) -> Tensor:
        """images (B, channels, H, W) → (B, dim, h, w); the mask (B, h, w) is True in real
        patches."""
        side = self.patch_size
        for layer in self:
            if isinstance(layer, nn.Conv2d) and mask_Bhw is not None:
                input = clear_pixels(input, mask_Bhw, side)
                side //= 2
            input = layer(input)
        return input
