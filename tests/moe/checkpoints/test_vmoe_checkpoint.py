"""Checkpoints of the official JAX code: read right, written as they are read."""

import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")
hypothesis = pytest.importorskip("hypothesis")
from checkpoint_files import (  # noqa: E402
    DATA,
    GOLDEN,
    PARAMS,
    SMALL,
    assert_same,
    chunk,
    floats,
    info,
    piece,
    write_by_hand,
)
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ironmoe.moe import CheckpointError, read_npz_checkpoint, read_vmoe_checkpoint  # noqa: E402
from ironmoe.moe.checkpoints.write import write_vmoe_checkpoint  # noqa: E402

# Reading and writing what is right


def test_the_official_checkpoint_reads_to_the_official_weights():
    assert len(PARAMS) == 58
    assert_same(read_vmoe_checkpoint(GOLDEN), PARAMS)


@pytest.mark.parametrize(
    "prefix", [GOLDEN, str(GOLDEN), f"{GOLDEN}.index", Path(f"{GOLDEN}.index")], ids=repr
)
def test_a_prefix_is_a_string_or_a_path_with_or_without_index(prefix):
    assert read_vmoe_checkpoint(prefix).keys() == PARAMS.keys()


def test_what_is_read_can_be_written_to():
    for array in (
        read_vmoe_checkpoint(GOLDEN) | read_npz_checkpoint(DATA / "vmoe_tiny.npz")
    ).values():
        array += 1


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [4, 1000, 1 << 28])
def test_written_weights_are_read_again(tmp_path, shards, chunk_bytes):
    params = {name: a for name, a in PARAMS.items() if a.nbytes <= 1000 * chunk_bytes}
    write_vmoe_checkpoint(tmp_path / "x", params, shards=shards, chunk_bytes=chunk_bytes)
    assert_same(read_vmoe_checkpoint(tmp_path / "x"), params)
    names = {"x.index", *(f"x.data-{i:05d}-of-{shards:05d}" for i in range(shards))}
    assert {file.name for file in tmp_path.iterdir()} == names


DTYPES = st.sampled_from(
    ["?", "i1", "i2", "<i4", ">i4", "i8", "u1", "u2", "u4", "u8", "f2", "<f4", ">f4", "f8"]
)
SHAPES = st.lists(st.integers(1, 5), max_size=4)


@st.composite
def any_array(draw):
    """Any bits, NaNs too."""
    dtype, shape, rng = (
        np.dtype(draw(DTYPES)),
        draw(SHAPES),
        np.random.default_rng(draw(st.integers(0, 99))),
    )
    bits = rng.integers(
        0, 2 if dtype.kind == "b" else 256, math.prod(shape) * dtype.itemsize, np.uint8
    )
    return bits.view(dtype).reshape(shape)


NAMES = st.sampled_from(["a", "a-b", "a.c", "b", "Dense_1", "Dense_10", "Dense_2", "é"])


@given(
    st.dictionaries(
        st.tuples(NAMES, st.integers(0, 11), NAMES), any_array(), min_size=1, max_size=6
    ),
    st.integers(1, 4),
    st.integers(1, 64),
)
def test_any_arrays_are_written_and_read_again(tmp_path_factory, arrays, shards, chunk_bytes):
    params = {
        f"{folder}/{number}/{name}": array for (folder, number, name), array in arrays.items()
    }
    prefix = tmp_path_factory.mktemp("any") / "x"
    write_vmoe_checkpoint(prefix, params, shards=shards, chunk_bytes=chunk_bytes)
    assert_same(
        read_vmoe_checkpoint(prefix),
        {name: a.astype(a.dtype.newbyteorder("=")) for name, a in params.items()},
    )


def test_the_version_is_written_and_parts_are_no_larger_than_asked_in_files_about_equal(tmp_path):
    write_vmoe_checkpoint(tmp_path / "x", PARAMS, shards=3, chunk_bytes=1000)
    index, sizes = msgpack.unpackb((tmp_path / "x.index").read_bytes()), []
    assert (index["version"], index["shard_count"]) == ("20220622", 3)
    for i in range(3):
        data = msgpack.unpackb((tmp_path / f"x.data-0000{i}-of-00003").read_bytes())
        chunks = [c for number, chunks in data.items() if number.isdigit() for c in chunks]
        contents = [msgpack.unpackb(pieces[0].data)[2] for pieces, _ in chunks]
        assert max(map(len, contents)) <= 1000
        sizes.append(sum(map(len, contents)))
    assert sum(sizes) == sum(array.nbytes for array in PARAMS.values())
    assert max(sizes) - min(sizes) <= 1000


def test_every_bfloat16_becomes_the_float32_of_the_same_value(tmp_path):
    bits = np.arange(1 << 16, dtype="<u2")
    prefix = write_by_hand(
        tmp_path,
        {"all": info((256, 256), "bfloat16"), "one": info((), "bfloat16")},
        {
            0: [chunk([piece(bits.tobytes(), "bfloat16")], (0, 256, None), (0, 256, None))],
            1: [chunk([piece(b"\x80\x3f", "bfloat16")])],
        },
    )
    found = read_vmoe_checkpoint(prefix)
    assert found["all"].dtype == np.float32
    np.testing.assert_array_equal(
        found["all"].view(np.uint32).ravel(), bits.astype(np.uint32) << 16
    )
    assert found["one"].shape == () and found["one"] == 1.0


def test_a_bool_is_true_whatever_bits_are_set(tmp_path):
    prefix = write_by_hand(
        tmp_path, {"w": info((3,), "bool")}, {0: [chunk([piece(b"\0\1\2", "bool")], (0, 3, None))]}
    )
    assert_same(read_vmoe_checkpoint(prefix), {"w": np.array([False, True, True])})


def test_a_part_in_several_pieces_in_any_order_of_files(tmp_path):
    parts = [((0, 2, None), (0, 2, None)), ((0, 2, None), (2, 3, 1))]
    prefix = write_by_hand(
        tmp_path,
        {"w": info((2, 3), parts=parts, shards=[1, 0])},
        {0: [chunk([piece(floats(2, 5))], *parts[1])]},
        {
            0: [
                chunk(
                    [piece(floats(0)), piece(floats(1, 3)), piece(b""), piece(floats(4))], *parts[0]
                )
            ]
        },
    )
    np.testing.assert_array_equal(read_vmoe_checkpoint(prefix)["w"], np.arange(6).reshape(2, 3))


def test_an_older_file_has_no_version_and_may_have_open_slices(tmp_path):
    part = ((None, None, None),)
    tree = {"a": {"b": info((2,), parts=[part]), "empty": {}, "none": None}}
    prefix = write_by_hand(tmp_path, tree, {0: [chunk([piece(floats(1, 2))], *part)]}, version=...)
    found = read_vmoe_checkpoint(prefix)
    assert found.keys() == {"a/b"}
    np.testing.assert_array_equal(found["a/b"], [1, 2])


def test_a_lone_params_root_is_left_out_and_another_root_keeps_it(tmp_path):
    write_vmoe_checkpoint(
        tmp_path / "lone", {f"params/{name}": array for name, array in PARAMS.items()}
    )
    assert_same(read_vmoe_checkpoint(tmp_path / "lone"), PARAMS)
    state = {"opt_state/mu/bias": np.ones(2), "params/bias": np.zeros(2)}
    write_vmoe_checkpoint(tmp_path / "state", state)
    assert_same(read_vmoe_checkpoint(tmp_path / "state"), state)


def test_bfloat16_of_ml_dtypes_is_written(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_vmoe_checkpoint(tmp_path / "x", {"w": values.astype(ml_dtypes.bfloat16)}, chunk_bytes=4)
    assert_same(read_vmoe_checkpoint(tmp_path / "x"), {"w": values})


# Writing what is wrong, and being interrupted


@pytest.mark.parametrize(
    ("params", "options", "error", "words"),
    [
        ({}, {}, ValueError, "params must hold one array"),
        ({"a": [1.0]}, {}, TypeError, "params\\['a'\\] must be a numpy array, got list"),
        (
            {"a": np.array([None])},
            {},
            TypeError,
            "params\\['a'\\] must be of a dtype among .* got object",
        ),
        ({"a": np.ones(2, complex)}, {}, TypeError, "got complex128"),
        ({"a": np.ones((2, 0))}, {}, ValueError, "got shape \\(2, 0\\)"),
        ({"a": np.ones((1,) * 33)}, {}, ValueError, "at most 32 axes"),
        (
            {"a": np.ones(1), "a/b": np.ones(1)},
            {},
            ValueError,
            "params\\['a/b'\\] must not lie below",
        ),
        ({"a//b": np.ones(1)}, {}, ValueError, "got 'a//b'"),
        ({"a" * 1001: np.ones(1)}, {}, ValueError, "at most 1000 characters"),
        (
            {"a": np.ones(70_000)},
            {"chunk_bytes": 1},
            ValueError,
            "splits params\\['a'\\] into 70000 parts",
        ),
        ({"a": np.ones(1)}, {"shards": 0}, ValueError, "shards must be 1 to 99999, got 0"),
        (
            {"a": np.ones(1)},
            {"chunk_bytes": 0},
            ValueError,
            "chunk_bytes must be 1 to 1073741824, got 0",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_a_file_is_made(
    tmp_path, params, options, error, words
):
    with pytest.raises(error, match=words):
        write_vmoe_checkpoint(tmp_path / "x", params, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing_call", range(1, 4))
def test_an_interrupted_write_leaves_the_older_checkpoint(small, monkeypatch, failing_call):
    calls = itertools.count(1)

    def fsync(descriptor):
        if next(calls) == failing_call:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        write_vmoe_checkpoint(
            small, {name: array + 1 for name, array in SMALL.items() if name != "used"}, shards=2
        )
    assert_same(read_vmoe_checkpoint(small), SMALL)
    assert not list(small.parent.glob(".tmp.*"))


@pytest.mark.parametrize("failing_call", range(1, 4))
def test_a_write_interrupted_among_its_renames_leaves_no_mixture(small, monkeypatch, failing_call):
    calls, replace = itertools.count(1), Path.replace

    def failing_replace(file, target):
        if next(calls) == failing_call:
            raise KeyboardInterrupt
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises(KeyboardInterrupt):
        write_vmoe_checkpoint(small, SMALL | {"step": np.int32(8)}, shards=2, chunk_bytes=16)
    with pytest.raises(CheckpointError, match=r"small\.index: found no such file"):
        read_vmoe_checkpoint(small)
    assert not list(small.parent.glob(".tmp.*"))


@pytest.mark.parametrize(
    "call",
    [lambda file: read_vmoe_checkpoint(GOLDEN), lambda file: write_vmoe_checkpoint(file, SMALL)],
)
def test_without_msgpack_the_error_says_how_to_get_it(tmp_path, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match="pip install msgpack"):
        call(tmp_path / "x")
