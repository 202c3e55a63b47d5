"""What every checkpoint format needs to read arrays: dtypes, their sizes, and values from bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from ironmoe.moe.checkpoints.errors import reading, require

MAX_AXES = 32
_INTS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
ITEMSIZE = {n: np.dtype(n).itemsize for n in ("bool", *_INTS, "float16", "float32", "float64")} | {
    "bfloat16": 2
}


def file_size(file: Path) -> int:
    """Bytes of a file. CheckpointError if there is none."""
    with reading(file, "a file"):
        # a pipe or a device is refused too: reading it may never end
        require(file.is_file(), file, "no such file", "a file")
        return file.stat().st_size


def require_shape(shape: Any, where: str) -> None:
    """CheckpointError unless ``shape`` is a list of positive int64 sizes."""
    valid = (
        isinstance(shape, list)
        and len(shape) <= MAX_AXES
        and all(type(n) is int and 0 < n < 1 << 63 for n in shape)
    )
    require(valid, where, shape, f"at most {MAX_AXES} positive sizes")


def decode(content: bytes, name: str, byteorder: Any = "<") -> np.ndarray:
    """Flat values in a dtype of this machine. A bfloat16 is the upper half of a float32."""
    if name == "bfloat16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    stored = np.dtype("uint8" if name == "bool" else name).newbyteorder(byteorder)
    return np.frombuffer(content, stored).astype(name)
