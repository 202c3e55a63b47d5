"""Checkpoints in .npz files: read right, or refused with a CheckpointError that names the file."""

import io
import struct
import zipfile

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")
hypothesis = pytest.importorskip("hypothesis")

from checkpoint_files import (  # noqa: E402
    DATA,
    PARAMS,
    SMALL,
    assert_same,
    damage,
    floats,
    memory_below,
)

from ironmoe.moe import (  # noqa: E402
    CheckpointError,
    open_npz_checkpoint,
    read_npz_checkpoint,
)


def test_an_npz_reads_to_its_weights():
    assert_same(read_npz_checkpoint(DATA / "vmoe_tiny.npz"), PARAMS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_opened_npz_reads_an_array_where_it_is_indexed(tmp_path, save):
    columns = np.asfortranarray(np.arange(12, dtype=">f4").reshape(4, 3))
    save(tmp_path / "vit.npz", **SMALL, columns=columns)
    opened = open_npz_checkpoint(tmp_path / "vit.npz")
    right = read_npz_checkpoint(tmp_path / "vit.npz")
    assert_same({name: np.asarray(array) for name, array in opened.items()}, right)
    for name, array in opened.items():
        assert (array.shape, array.dtype) == (right[name].shape, right[name].dtype)
    np.testing.assert_array_equal(opened["columns"][1:3, 2:], columns[1:3, 2:])


def test_a_changed_number_is_noticed_when_its_array_is_read(tmp_path):
    np.savez(tmp_path / "vit.npz", a=np.full(9, 1.5), b=np.full(9000, 2.5))
    content = (tmp_path / "vit.npz").read_bytes()
    at = content.rindex(np.full(9, 2.5).tobytes())
    (tmp_path / "vit.npz").write_bytes(content[:at] + b"\1" + content[at + 1 :])
    opened = open_npz_checkpoint(tmp_path / "vit.npz")
    assert opened["a"][...].tolist() == [1.5] * 9
    with pytest.raises(CheckpointError, match=r"vit\.npz: leaf b"):
        opened["b"][:1]


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
