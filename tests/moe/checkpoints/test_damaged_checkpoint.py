"""Checkpoints that are damaged, lie or are no checkpoints: refused with a CheckpointError that
names the file, in little memory."""

import itertools
import os
import pickle
import shutil
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")
hypothesis = pytest.importorskip("hypothesis")
from checkpoint_files import (  # noqa: E402
    DATA,
    GOLDEN_FILES,
    PARAMS,
    chunk,
    damage,
    floats,
    info,
    memory_below,
    piece,
    read_or_refuse,
    write_by_hand,
)
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ironmoe.moe import CheckpointError, read_npz_checkpoint, read_vmoe_checkpoint  # noqa: E402


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
