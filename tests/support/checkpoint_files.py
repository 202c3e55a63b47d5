"""Checkpoints for tests: the official ones, written by hand, and damaged."""

import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import msgpack
import numpy as np

from ironmoe.moe import CheckpointError, read_vmoe_checkpoint

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "vmoe_tiny"
GOLDEN_FILES = [
    f"vmoe_tiny.{end}" for end in ("index", *(f"data-0000{i}-of-00003" for i in range(3)))
]
with np.load(DATA / "vmoe_tiny.npz") as _arrays:
    PARAMS = {
        name.removeprefix("params/"): _arrays[name]
        for name in _arrays.files
        if name.startswith("params/")
    }
SMALL = {
    "Encoder/Norm/bias": np.arange(3, dtype=np.float32) + 0.5,
    "Encoder/kernel": np.arange(8, dtype=np.float64).reshape(2, 4),
    "step": np.int32(7),
    "used": np.array([True, False]),
}


def assert_same(found, expected):
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            expected[name].dtype,
            expected[name].shape,
            expected[name].tobytes(),
        ), name


def pack_slices(*axes):
    return msgpack.packb([msgpack.packb(axis) for axis in axes])


def info(shape, dtype="float32", parts=None, shards=None, code=8):
    """An array's entry in the index, written by hand. By default one part in data file 0."""
    parts = [tuple((0, size, None) for size in shape)] if parts is None else parts
    shaped = msgpack.packb((shape, dtype, False, {}))
    fields = (
        shaped,
        [pack_slices(*part) for part in parts],
        [0] * len(parts) if shards is None else shards,
    )
    return msgpack.ExtType(code, msgpack.packb(fields))


def piece(content, dtype="float32", shape=None, code=1):
    size = len(content) // (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
    return msgpack.ExtType(
        code, msgpack.packb(((size,) if shape is None else shape, dtype, content))
    )


def chunk(pieces, *axes, code=6):
    return [pieces, msgpack.ExtType(code, pack_slices(*axes))]


def write_by_hand(folder, tree, *shards, **index):
    """``shards``: of each data file a dict from leaf numbers to chunks."""
    fields = {"version": "20220622", "shard_count": len(shards), "index": tree} | index
    (folder / "hand.index").write_bytes(
        msgpack.packb({k: v for k, v in fields.items() if v is not ...})
    )
    for i, leaves in enumerate(shards):
        data = {"__msgpack_array_chunk_a87ca2__": True} | {
            str(number): chunks for number, chunks in leaves.items()
        }
        (folder / f"hand.data-{i:05d}-of-{len(shards):05d}").write_bytes(msgpack.packb(data))
    return folder / "hand"


def floats(*values):
    return np.array(values, "<f4").tobytes()


def read_or_refuse(prefix):
    """The arrays, or None if a CheckpointError named a file; any other exception fails the test."""
    try:
        return read_vmoe_checkpoint(prefix)
    except CheckpointError as error:
        assert (
            str(error).startswith((f"{prefix}.index: ", f"{prefix}.data-"))
            and len(str(error)) < 3000
        ), error
        return None


def damage(whole, bits_per_byte):
    """The content with one bit flipped, again and again; every byte has its turn."""
    for i, byte in enumerate(whole):
        for k in range(bits_per_byte):
            yield whole[:i] + bytes([byte ^ 1 << (5 * i + 3 * k) % 8]) + whole[i + 1 :]


@contextmanager
def memory_below(limit):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
