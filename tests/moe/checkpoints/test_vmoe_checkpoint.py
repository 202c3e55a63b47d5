"""Checkpoints of the official JAX code: read right, or refused with a CheckpointError that names
the file."""

import io
import itertools
import math
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ironmoe.moe.checkpoints.read import CheckpointError, read_npz_checkpoint, read_vmoe_checkpoint  # noqa: E402
from ironmoe.moe.checkpoints.write import write_vmoe_checkpoint  # noqa: E402

DATA = Path(__file__).parents[2] / "data"
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


@pytest.fixture
def golden(tmp_path):
    for name in GOLDEN_FILES:
        shutil.copy(DATA / name, tmp_path)
    return tmp_path / "vmoe_tiny"


@pytest.fixture
def small(tmp_path):
    write_vmoe_checkpoint(tmp_path / "small", SMALL, shards=2, chunk_bytes=16)
    return tmp_path / "small"


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


# Damaged files


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


def test_a_flipped_bit_changes_one_number_or_one_name_or_is_refused(small):
    """The format has no checksums: a bit of a weight, or of a name, is all that may go
    unnoticed."""
    expected, outcomes = list(read_vmoe_checkpoint(small).items()), Counter()
    for file in sorted(small.parent.iterdir()):
        whole = file.read_bytes()
        for damaged in damage(whole, bits_per_byte=2):
            file.write_bytes(damaged)
            found = read_or_refuse(small)
            outcomes[found is None] += 1
            changed, renamed = 0, False
            for (name, array), (right_name, right) in zip(
                (found or {}).items(), expected if found else (), strict=True
            ):
                assert (array.dtype, array.shape) == (right.dtype, right.shape)
                changed += np.count_nonzero(
                    np.frombuffer(array.tobytes(), "u1") != np.frombuffer(right.tobytes(), "u1")
                )
                renamed |= name != right_name
            assert not renamed if file.suffix != ".index" else not changed
            assert changed <= 1
        file.write_bytes(whole)
    assert outcomes[True] > outcomes[False] > 0


def test_a_file_cut_off_anywhere_is_refused(small):
    for file in sorted(small.parent.iterdir()):
        whole = file.read_bytes()
        for end in range(len(whole)):
            file.write_bytes(whole[:end])
            with pytest.raises(CheckpointError, match=r"small\."):
                read_vmoe_checkpoint(small)
        file.write_bytes(whole + b"\0")
        with pytest.raises(CheckpointError, match=r"small\."):
            read_vmoe_checkpoint(small)
        file.write_bytes(whole)


@given(st.data())
def test_a_spoiled_official_checkpoint_is_read_or_refused_in_little_memory(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("spoiled")
    for name in GOLDEN_FILES:
        shutil.copy(DATA / name, folder)
    file = folder / data.draw(st.sampled_from(GOLDEN_FILES))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 8))
        content[at : at + length] = data.draw(st.binary(max_size=8))
    file.write_bytes(content)
    with memory_below(4_000_000):  # the checkpoint is 350 kB
        found = read_or_refuse(folder / "vmoe_tiny")
    if found is not None:
        assert [(a.dtype, a.shape) for a in found.values()] == [
            (np.float32, PARAMS[n].shape) for n in sorted(PARAMS, key=lambda name: name.split("/"))
        ]


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(tmp_path_factory, content, as_index):
    folder = tmp_path_factory.mktemp("bytes")
    prefix = write_by_hand(
        folder, {"w": info((2,))}, {0: [chunk([piece(floats(1, 2))], (0, 2, None))]}
    )
    file = folder / ("hand.index" if as_index else "hand.data-00000-of-00001")
    file.write_bytes(content)
    assert read_or_refuse(prefix) is None
    with pytest.raises(CheckpointError):
        read_npz_checkpoint(file)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_a_missing_file_is_named(golden, name):
    (golden.parent / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: found no such file"):
        read_vmoe_checkpoint(golden)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(GOLDEN_FILES, 2)))
def test_files_that_changed_places_are_refused(golden, a, b):
    first, second = (golden.parent / a).read_bytes(), (golden.parent / b).read_bytes()
    (golden.parent / a).write_bytes(second)
    (golden.parent / b).write_bytes(first)
    assert read_or_refuse(golden) is None


# Files that lie


# the data file of one leaf of four numbers
W = {0: [chunk([piece(floats(1, 2, 3, 4))], (0, 4, None))]}
HALVES = [((0, 2, None),), ((2, 4, None),)]


@pytest.mark.parametrize(
    ("tree", "data", "words"),
    [
        (
            {"w": info((1 << 40,))},
            W,
            r"00001: found \d+ bytes, expected 4398046511104 or more, as .*hand\.index says",
        ),
        ({"w": info((1 << 62, 1 << 62))}, W, "bytes, expected 8507059.* or more"),
        ({"w": info((-4,))}, W, "found .-4., expected at most 32 positive sizes"),
        ({"w": info((0,))}, W, "found .0., expected at most 32 positive sizes"),
        ({"w": info((4.0,))}, W, "leaf w: found .4.0., expected at most 32 positive sizes"),
        ({"w": info((1,) * 33)}, W, "expected at most 32 positive sizes"),
        (
            {"w": info((4,), "complex64")},
            W,
            "leaf w: found b'complex64', expected a dtype among bool, ",
        ),
        ({"w": info((4,), "object")}, W, "leaf w: found b'object', expected a dtype among"),
        ({"w": info((4,), "O")}, W, "leaf w: found b'O', expected a dtype among"),
        (
            {"w": info((4,), parts=[((0, 5, None),)])},
            W,
            "leaf w: found .0, 5, None., expected .* within 0 and 4",
        ),
        ({"w": info((4,), parts=[((-1, 4, None),)])}, W, "leaf w: found .-1, 4, None."),
        ({"w": info((4,), parts=[((0, 4, 2),)])}, W, "leaf w: found .0, 4, 2."),
        ({"w": info((4,), parts=[((4, 0, None),)])}, W, "leaf w: found .4, 0, None."),
        (
            {"w": info((4,), parts=[((0, 4, None), (0, 1, None))])},
            W,
            "leaf w: found .*, expected 1 fields",
        ),
        (
            {"w": info((4,), parts=[((0, 3, None),)])},
            W,
            "leaf w: found .*, expected parts of 4 elements in all",
        ),
        ({"w": info((4,), parts=[])}, W, "leaf w: found .., expected parts of 4 elements in all"),
        (
            {"w": info((4,), parts=[((0, 2, None),), ((1, 3, None),)])},
            W,
            "leaf w: found parts that overlap",
        ),
        ({"w": info((4,), shards=[1])}, W, "leaf w: found .1., expected data files below 1"),
        ({"w": info((4,), shards=[-1])}, W, "leaf w: found .-1., expected data files below 1"),
        (
            {"w": info((4,), shards=[0, 0])},
            W,
            "leaf w: found .*, expected a list of parts and one of their data files",
        ),
        (
            {"w": info((4,), code=7)},
            W,
            "leaf w: found msgpack extension 7 of .* bytes, expected msgpack extension 8",
        ),
        ({"w": [1, 2]}, W, "leaf w: found .1, 2., expected msgpack extension 8"),
        (
            {"w": info((4,)), "v": info((4,))},
            W,
            "found .'?w'?, '?v'?., expected names in sorted order",
        ),
        ({"a": {"b": info((4,))}, "a/b": info((4,))}, W, "expected leaves with different paths"),
        ({"a" * 1001: info((4,))}, W, "paths of at most 1000 characters"),
        ({}, W, "expected leaves with different paths"),
        (
            {"v": info((4,)), "w": info((4,))},
            W | {"pad": "x" * 16},
            "leaf w: found .., expected 1 parts",
        ),
        (
            {"w": info((4,), "int32")},
            W,
            r"data-00000-of-00001: leaf w: found .b'float32', .*, expected \[int32, bytes\]",
        ),
        ({"w": info((2, 2))}, W, "leaf w: found .*, expected 2 fields"),
        ({"w": info((4,), parts=HALVES)}, W, "leaf w: found .*, expected 2 parts"),
        (
            {"w": info((4,))},
            W | {1: []},
            r"data-00000-of-00001: found .*, expected leaves with numbers below 1",
        ),
        ({"w": info((4,))}, W | {"x": []}, "expected leaves with numbers below 1"),
        ({"w": info((4,))}, {0: 2 * W[0]}, "leaf w: found .*, expected 1 parts"),
        (
            {"w": info((4,))},
            {0: [chunk([piece(floats(1, 2, 3))], (0, 4, None))], "pad": "x" * 9},
            "found 12 bytes, expected 16",
        ),
        (
            {"w": info((4,))},
            {0: [chunk([piece(floats(1, 2, 3, 4), shape=(2, 2))], (0, 4, None))]},
            "found shape .2, 2. of 16 bytes",
        ),
        (
            {"w": info((4,))},
            {0: [chunk([piece(floats(1, 2, 3, 4) + b"\0")], (0, 4, None))]},
            "of 17 bytes, expected shape",
        ),
        (
            {"w": info((4,))},
            {0: [chunk([piece(floats(1, 2, 3, 4), code=3)], (0, 4, None))]},
            "expected msgpack extension 1",
        ),
        (
            {"w": info((4,))},
            {0: [chunk([piece(floats(1, 2, 3, 4))], (0, 4, None), code=5)]},
            "expected msgpack extension 6",
        ),
        (
            {"w": info((4,))},
            {0: [chunk(7, (0, 4, None))], "pad": "x" * 16},
            "leaf w: found 7, expected a list of pieces",
        ),
        (
            {"w": info((4,))},
            {0: [[1, 2, 3]], "pad": "x" * 16},
            "leaf w: found .*, expected .pieces, slices.",
        ),
        (
            {"w": info((4,), parts=HALVES)},
            {0: 2 * [chunk([piece(floats(1, 2))], (0, 2, None))]},
            "that the index says is here, once",
        ),
    ],
)
def test_a_lie_is_refused_in_words_and_costs_no_memory(tmp_path, tree, data, words):
    prefix = write_by_hand(tmp_path, tree, data)
    with memory_below(300_000), pytest.raises(CheckpointError, match=words) as error:
        read_vmoe_checkpoint(prefix)
    assert str(error.value).startswith(f"{tmp_path}/hand.")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"version": "20300101"}, "found 20300101, expected version 20220622 or none"),
        ({"version": ["20220622"]}, "expected version 20220622 or none"),
        ({"shard_count": 0}, "found 0, expected a positive shard_count"),
        ({"shard_count": True}, "found True, expected a positive shard_count"),
        ({"shard_count": 1 << 60}, r"hand\.data-00000-of-1152921504606846976: found no such file"),
        ({"shard_count": ...}, "found None, expected a positive shard_count"),
        ({"index": [1]}, "expected a V-MoE checkpoint's index"),
        ({"index": info((4,))}, "expected a V-MoE checkpoint's index"),
    ],
)
def test_the_head_of_an_index_is_checked(tmp_path, field, words):
    with pytest.raises(CheckpointError, match=words):
        read_vmoe_checkpoint(write_by_hand(tmp_path, {"w": info((4,))}, W, **field))


@pytest.mark.parametrize(
    "found",
    [
        "x" * 100_000,
        b"x" * 100_000,
        7 * [7 * [7 * [7 * [7 * ["x" * 100]]]]],
        {"x" * 99: ["x" * 99]},
    ],
)
def test_a_message_is_short_whatever_was_found(tmp_path, found):
    for prefix in (
        write_by_hand(tmp_path, {"w": found}, W),
        write_by_hand(tmp_path, {}, W, version=found),
    ):
        with pytest.raises(CheckpointError) as error:
            read_vmoe_checkpoint(prefix)
        assert len(str(error.value)) < 1500 + len(str(tmp_path))


def test_an_older_train_state_whose_order_is_unknown_is_refused(tmp_path):
    state = {"step": info((4,)), "params": {"w": info((4,))}}
    data = {0: W[0], 1: W[0]}
    with pytest.raises(CheckpointError, match="expected names in sorted order"):
        read_vmoe_checkpoint(write_by_hand(tmp_path, state, data, version=...))


@pytest.mark.parametrize(
    "content",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 2^32 - 1
        b"\xdd\x00\x01\x00\x00" * 900 + bytes(1 << 17),  # lists of 65536 in lists
        b"\xdd\x00\x02\x00\x00" * 900 + bytes(1 << 17),  # of twice as many
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\x81\xa1a" * 5000 + b"\xc0",  # maps in maps, deeper than Python's stack
        msgpack.packb({"shard_count": 1, "index": {b"a": {"b": 1}}}),
        msgpack.packb(
            {"shard_count": 1, "index": {"a": msgpack.ExtType(8, b"\xdd\xff\xff\xff\xff")}}
        ),
        b"\x83"
        + b"".join(map(msgpack.packb, ("shard_count", 1, "version", None, "index")))
        + b"\x81\xa1a" * 990
        + b"\x80",
        b"\xd7\xff" + b"\xff" * 8,  # a timestamp that is none
    ],
    ids=range(11),
)
def test_claims_of_msgpack_are_refused_and_cost_no_memory(tmp_path, content):
    (tmp_path / "x.index").write_bytes(content)
    lists = content.startswith(b"\xdd\x00\x01")  # of memory that is asked for and never touched
    with (
        memory_below(1 << 30 if lists else 3_000_000),
        pytest.raises(CheckpointError, match=r"x\.index: "),
    ):
        read_vmoe_checkpoint(tmp_path / "x")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def foreign_files(folder):
    with zipfile.ZipFile(folder / "foreign.zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb(folder / "bomb")))
    np.savez(folder / "objects.npz", a=np.array([Bomb(folder / "bomb")], object))
    np.save(folder / "array.npy", np.ones(3))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {
        "empty": b"",
        "text": b"This is no checkpoint.\n",
        "pickle": pickle.dumps({"w": Bomb(folder / "bomb")}),
        "safetensors": struct.pack("<Q", len(header)) + header + floats(1),
        "zip": (folder / "foreign.zip").read_bytes(),
        "npz": (folder / "objects.npz").read_bytes(),
        "npy": (folder / "array.npy").read_bytes(),
        "empty zip": b"PK\5\6" + bytes(18),
        "msgpack": msgpack.packb({"a": 1}),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "text",
        "pickle",
        "safetensors",
        "zip",
        "npz",
        "npy",
        "empty zip",
        "msgpack",
        "folder",
        "pipe",
    ],
)
def test_a_foreign_file_is_refused_and_never_unpickled(golden, tmp_path, kind):
    files = [golden.parent / name for name in (GOLDEN_FILES[0], GOLDEN_FILES[2])]
    for file in [*files, tmp_path / "vit.npz"]:
        right = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.write_bytes(foreign_files(tmp_path)[kind])
        with pytest.raises(CheckpointError, match=file.name):
            read_npz_checkpoint(file) if file.suffix == ".npz" else read_vmoe_checkpoint(golden)
        file.rmdir() if kind == "folder" else file.unlink()
        file.write_bytes(right)
    assert not (tmp_path / "bomb").exists()


# The dense ViT's .npz


def test_an_npz_reads_to_its_weights():
    assert_same(read_npz_checkpoint(DATA / "vmoe_tiny.npz"), PARAMS)


@pytest.mark.parametrize("root", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_may_have_a_root_and_an_optimizer_state(tmp_path, root, save):
    others = {"opt/state/step": np.ones(1, complex)} if root else {}
    save(tmp_path / "vit.npz", **{root + name: array for name, array in SMALL.items()}, **others)
    assert_same(read_npz_checkpoint(str(tmp_path / "vit.npz")), SMALL)


def test_an_npz_may_hold_bfloat16_other_byte_orders_and_columns_first(tmp_path):
    bits = np.arange(1 << 16, dtype="<u2").reshape(256, 256)
    right = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(
        tmp_path / "vit.npz",
        bf16=bits.view("V2"),
        columns=np.asfortranarray(right),
        big=right.astype(">f4"),
    )
    found = read_npz_checkpoint(tmp_path / "vit.npz")
    as_float = (bits.astype(np.uint32) << 16).view(np.float32)
    assert_same(found, {"bf16": as_float, "columns": right, "big": right})


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([None]), "leaf w: found .*, expected a dtype among bool"),
        (np.ones(2, complex), "leaf w: found .*complex128.*, expected a dtype among"),
        (np.zeros(2, [("a", "u1"), ("b", "u1")]), "leaf w: found .*, expected a dtype among"),
        (np.array(["text"]), "leaf w: found .*, expected a dtype among"),
        (np.zeros(2, "V4"), "leaf w: found .*, expected a dtype among"),
        (np.ones((2, 0)), "leaf w: found .2, 0., expected at most 32 positive sizes"),
    ],
)
def test_an_npz_of_other_things_than_numbers_is_refused(tmp_path, array, words):
    np.savez(tmp_path / "vit.npz", w=array)
    with pytest.raises(CheckpointError, match=rf"vit\.npz: {words}"):
        read_npz_checkpoint(tmp_path / "vit.npz")


def save_member(file, content, **options):
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("w.npy", content)


@pytest.mark.parametrize(
    "shape",
    [
        "(1099511627776,)",
        "(4611686018427387904, 4611686018427387904)",
        "(2,)",
        "(True, 2)",
        "(" + "9" * 4000 + "," + "9" * 4000 + ")",
    ],
)
def test_an_npz_that_claims_more_or_less_than_it_has_is_refused(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    save_member(
        tmp_path / "vit.npz",
        b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + floats(1, 2, 3),
    )
    with memory_below(500_000), pytest.raises(CheckpointError, match=r"vit\.npz: leaf w: found"):
        read_npz_checkpoint(tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("field", "size"), [(20, 4), (30, 2), (32, 2)], ids=["size", "extra", "comment"]
)
def test_an_npz_whose_directory_lies_is_refused(tmp_path, field, size):
    """About the size of a member, or of its remarks: they would hide the members after it."""
    others = [*(f"name_{i:02d}" for i in range(8)), "longer_name"]
    np.savez(tmp_path / "vit.npz", a=np.ones(3), **{name: np.ones(3) for name in others})
    content = bytearray((tmp_path / "vit.npz").read_bytes())
    first, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    rest = end - first - 46 - len("a.npy")
    assert rest == 517  # a length that the standard library takes for one remark
    lie = rest if size == 2 else 0xFFFFFFF0
    content[first + field : first + field + size] = lie.to_bytes(size, "little")
    (tmp_path / "vit.npz").write_bytes(content)
    with memory_below(500_000), pytest.raises(CheckpointError, match=r"vit\.npz: "):
        read_npz_checkpoint(tmp_path / "vit.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_in_a_compression_that_numpy_never_writes_is_refused(tmp_path, compression):
    stream = io.BytesIO()
    np.save(stream, np.zeros(9))
    save_member(tmp_path / "vit.npz", stream.getvalue(), compression=compression)
    with pytest.raises(CheckpointError, match="stored or deflated"):
        read_npz_checkpoint(tmp_path / "vit.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_gives_the_right_values_or_is_refused(tmp_path, save):
    """An .npz has checksums."""
    file, right = (
        tmp_path / "vit.npz",
        {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.int8)},
    )
    save(file, **right)
    whole, refused = file.read_bytes(), 0
    for damaged in [
        *damage(whole, bits_per_byte=1),
        *(whole[:end] for end in range(0, len(whole), 5)),
    ]:
        file.write_bytes(damaged)
        try:
            found = read_npz_checkpoint(file)
        except CheckpointError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert_same(found, right)
    assert refused > len(whole) // 2
