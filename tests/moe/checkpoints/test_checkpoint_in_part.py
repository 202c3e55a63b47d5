"""Checkpoints of the official code that are read in part, by the headers of their files."""

import io
import itertools

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")
from checkpoint_files import GOLDEN, PARAMS, SMALL  # noqa: E402

from ironmoe.moe import (  # noqa: E402
    CheckpointError,
    open_vmoe_checkpoint,
    read_vmoe_checkpoint,
    write_vmoe_checkpoint,
)
from ironmoe.moe.checkpoints import vmoe_data  # noqa: E402
from ironmoe.moe.checkpoints.msgpack_headers import MsgpackFile  # noqa: E402

EXPERTS = np.arange(6 * 4 * 5, dtype=np.float32).reshape(6, 4, 5)


def test_an_opened_checkpoint_says_what_it_holds_and_reads_it_where_it_is_indexed():
    opened = open_vmoe_checkpoint(GOLDEN)
    assert list(opened) == list(read_vmoe_checkpoint(GOLDEN))
    for name, array in opened.items():
        right = PARAMS[name]
        assert (array.shape, array.ndim, array.dtype) == (right.shape, right.ndim, right.dtype)
        assert array.nbytes == right.nbytes
        np.testing.assert_array_equal(np.asarray(array), right)
        np.testing.assert_array_equal(array[1:], right[1:])


@pytest.mark.parametrize("chunk_bytes", [4, 24, 100, 1 << 20])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_any_box_of_an_array_is_read_from_parts_of_any_size(
    tmp_path, monkeypatch, chunk_bytes, block
):
    monkeypatch.setattr(vmoe_data, "_BLOCK", block)
    write_vmoe_checkpoint(tmp_path / "x", {"w": EXPERTS}, shards=3, chunk_bytes=chunk_bytes)
    stored = open_vmoe_checkpoint(tmp_path / "x")["w"]
    axes = [slice(None), slice(2, 4), slice(1, None), slice(-1, None), slice(3, 1)]
    for index in itertools.product(axes, repeat=3):
        np.testing.assert_array_equal(stored[index], EXPERTS[index])
    np.testing.assert_array_equal(stored[2:3], EXPERTS[2:3])
    np.testing.assert_array_equal(stored[...,], EXPERTS)


@pytest.mark.parametrize("index", [0, (slice(None), 1), slice(0, 4, 2), (slice(None),) * 4])
def test_an_index_that_is_no_box_is_refused(tmp_path, index):
    write_vmoe_checkpoint(tmp_path / "x", {"w": EXPERTS})
    with pytest.raises(IndexError, match="index must be at most 3 slices of step 1, and dots, got"):
        open_vmoe_checkpoint(tmp_path / "x")["w"][index]


def test_a_share_of_the_experts_needs_the_files_with_these_experts_alone(tmp_path):
    write_vmoe_checkpoint(tmp_path / "x", {"w": EXPERTS}, shards=2, chunk_bytes=EXPERTS[:3].nbytes)
    stored = open_vmoe_checkpoint(tmp_path / "x")["w"]
    (tmp_path / "x.data-00001-of-00002").unlink()
    np.testing.assert_array_equal(stored[:3], EXPERTS[:3])
    with pytest.raises(CheckpointError, match="00001-of-00002: found no such file"):
        stored[2:4]


def test_few_bytes_of_a_file_are_read_for_one_expert(tmp_path, monkeypatch):
    """All experts lie in one part of one file."""
    large = np.arange(64 * 1000, dtype=np.float32).reshape(64, 1000)
    write_vmoe_checkpoint(tmp_path / "x", {"w": large})
    stored = open_vmoe_checkpoint(tmp_path / "x")["w"]
    stored[:1]  # the headers
    counts, decode = [], vmoe_data.decode
    monkeypatch.setattr(
        vmoe_data,
        "decode",
        lambda content, *of: counts.append(len(content)) or decode(content, *of),
    )
    np.testing.assert_array_equal(stored[7:9], large[7:9])
    assert sum(counts) == large[7:9].nbytes


def test_a_damaged_file_is_refused_when_one_of_its_parts_is_read(small):
    opened = open_vmoe_checkpoint(small)
    file = small.with_name("small.data-00000-of-00002")
    file.write_bytes(b"\xc1" + file.read_bytes()[1:])
    refused = 0
    for name, array in opened.items():
        try:
            np.testing.assert_array_equal(array[...], SMALL[name])
        except CheckpointError as error:
            assert str(error).startswith(str(file))
            refused += 1
    assert 0 < refused < len(opened)


VALUES = [
    *(b"x" * n for n in (0, 1, 255, 256, 65535, 65536)),
    *("x" * n for n in (0, 31, 32, 255, 256, 65536)),
    *(msgpack.ExtType(5, b"x" * n) for n in (0, 1, 2, 3, 4, 8, 16, 17, 256, 65536)),
    *([1] * n for n in (0, 15, 16, 65536)),
    *(dict.fromkeys(range(n)) for n in (0, 15, 16, 65536)),
]
NUMBERS = [0, 127, 128, 1 << 40, -1, -32, -33, -(1 << 40), 1.5, True, False, None, "text", ""]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_header_says_what_a_value_is_and_where_it_ends(value):
    packed = msgpack.packb(value)
    file = MsgpackFile(io.BytesIO(b"\xc0" + packed + b"\xc0"), len(packed) + 2, "file")
    header = file.header(1)
    kind = {bytes: "bin", str: "str", msgpack.ExtType: "ext", list: "array", dict: "map"}
    content = value.data if isinstance(value, msgpack.ExtType) else value
    assert (header.kind, header.length) == (kind[type(value)], len(content))
    assert file.end(1) == 1 + len(packed)
    if header.kind in ("bin", "str", "ext"):
        assert header.stop == 1 + len(packed)
        found = file.bytes(header.start, header.length)
        assert found == (content.encode() if isinstance(value, str) else content)
    if header.kind == "ext":
        assert header.code == 5


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_a_small_value_is_read_with_the_place_of_the_next_one(value):
    packed = msgpack.packb(value)
    for after in (b"", b"\xc0" * 20):
        file = MsgpackFile(io.BytesIO(packed + after), len(packed) + len(after), "file")
        assert file.small_value(0) == (value, len(packed))
        assert type(file.small_value(0)[0]) is type(value)
