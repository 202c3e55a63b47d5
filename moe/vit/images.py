"""Images of several sizes as one batch (NaViT, arXiv 2307.06304)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ironmoe.kernels.checks import check_counts


def pad_images(
    images: Sequence[Tensor], *, image_size: int, patch_size: int
) -> tuple[Tensor, Tensor]:
    """Images of several sizes → one batch, and the mask that ``VMoE`` takes with it.

    Each image lies in the upper left corner of a square of zeros, so its patches have the positions
    of that corner. Gradients reach the images.

    Args:
        images: each (C, H, W), all with the same C, dtype and device. H and W are multiples of
            ``patch_size`` up to ``image_size``, or ``image_size`` itself.
        image_size: side of the square, in pixels; patch_size: side of a patch; as in ``VMoE``.

    Returns:
        images (B, C, image_size, image_size); mask (B, N) bool over the patches, row after row,
        True where a patch is part of the image.

    Raises:
        ValueError: there are no images, or a size is none of these.
    """
    check_counts(image_size=image_size, patch_size=patch_size)
    if not images:
        raise ValueError("images must hold at least one image, got none")
    for i, image in enumerate(images):
        if image.ndim != 3 or not all(_fits(n, image_size, patch_size) for n in image.shape[1:]):
            raise ValueError(
                f"images[{i}] must have shape (C, H, W), with H and W multiples of patch_size = "
                f"{patch_size} up to image_size = {image_size}, got {tuple(image.shape)}"
            )

    padded, masks = [], []
    patches = -(-image_size // patch_size)
    for image in images:
        height, width = image.shape[1:]
        square = nn.functional.pad(image, (0, image_size - width, 0, image_size - height))
        mask = torch.zeros(patches, patches, dtype=torch.bool, device=image.device)
        mask[: -(-height // patch_size), : -(-width // patch_size)] = True
        padded.append(square)
        masks.append(mask.flatten())
    return torch.stack(padded), torch.stack(masks)


def _fits(side: int, image_size: int, patch_size: int) -> bool:
    return side == image_size or (0 < side < image_size and side % patch_size == 0)
