"""Short numbers for what must not change between two runs."""

import hashlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def checksum(values: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's values, going on from ``start``."""
    return zlib.crc32(
        values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), start
    )


def checksums_of(
    images: Tensor, labels: Tensor, further: Mapping[str, Tensor] | None = None
) -> list[int]:
    """CRC-32 of each image (N, …) with its label (N, …): ``checksum(image, checksum(label))``. It
    goes on over the ``further`` inputs of the model that belong to the image, if there are any."""
    found = [0] * len(images)
    named = sorted((further or {}).items())
    for name, part in [("", labels), ("", images), *named]:
        rows = part.detach().cpu().contiguous().unsqueeze(1).flatten(1).view(torch.uint8).numpy()
        key = name.encode()
        found = [
            zlib.crc32(row.data, zlib.crc32(key, before))
            for before, row in zip(found, rows, strict=True)
        ]
    return found


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
