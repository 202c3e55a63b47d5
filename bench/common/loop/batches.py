"""The batches of an epoch. They depend on (seed, epoch) alone, so that an interrupted training goes
on with the same ones."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

MAX_SHIFT = 2  # pixels; the one augmentation


def batches(
    images: Tensor, labels: Tensor, batch_size: int, seed: int, epoch: int, shifts: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch. They are the same ones for every architecture.

    Args:
        images: (N, C, S, S); labels: (N,).
        shifts: whether each image is moved by a few pixels.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    order = torch.randperm(len(images), generator=generator)
    for rows in order.split(batch_size):
        batch = images[rows]
        yield _shifted(batch, generator) if shifts else batch, labels[rows]


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of all random numbers of an epoch."""
    return seed * 1_000_003 + epoch


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to MAX_SHIFT pixels, small ones by up to an eighth. The edges are
    filled with zeros."""
    reach = min(MAX_SHIFT, images.shape[-1] // 8)
    padded = nn.functional.pad(images, (reach,) * 4)
    size = images.shape[-1]
    dy, dx = torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator)
    rows = dy[:, None] + torch.arange(size)
    columns = dx[:, None] + torch.arange(size)

    # indices on both sides of a slice put its axis, the channels, last: permute puts it back
    return padded[
        torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)
