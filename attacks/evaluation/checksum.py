"""Short numbers for what must not change between two runs."""

import hashlib
import re
import zlib
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def checksum(values: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's values, going on from ``start``."""
    return zlib.crc32(
        values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), start
    )


def checksums_of(images: Tensor, labels: Tensor, *extra: Tensor) -> list[int]:
    """CRC-32 of each image (N, …) with its label (N, …) and its further inputs (N, …):
    ``checksum(image, checksum(label))``, and so on."""
    rows = [
        part.detach().cpu().contiguous().unsqueeze(1).flatten(1).view(torch.uint8).numpy()
        for part in (labels, images, *extra)
    ]
    return [
        reduce(lambda start, part: zlib.crc32(part.data, start), parts, 0)
        for parts in zip(*rows, strict=True)
    ]


def model_digest(model: Any) -> str:
    """SHA-256 of what a module prints and of its weights and buffers; of another callable its name,
    which is all that is known."""
    if not isinstance(model, torch.nn.Module):
        return str(getattr(model, "__qualname__", type(model).__qualname__))
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
    return digest.hexdigest()
