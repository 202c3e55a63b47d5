"""Arrays of .npz files: read from the disk where they can be, whatever their layout."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from ironmoe.attacks.data import DataError, ImageArrays, UnreadableImage, image_arrays

GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(0, 256, (6, 3, 4, 5), np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2])


def saved(path, images, labels=LABELS, write=np.savez):
    write(path, images=images, labels=labels)
    return image_arrays(path)


def is_mapped(images):
    """Whether the array is still in its file."""
    base = images.images
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("layout", ["first", "last", "grey", "grey first", "grey last"])
def test_every_layout_gives_the_same_pixels(tmp_path, write, order, layout):
    images, wanted = {
        "first": (BYTES, BYTES),
        "last": (BYTES.transpose(0, 2, 3, 1), BYTES),
        "grey": (BYTES[:, 0], BYTES[:, :1]),
        "grey first": (BYTES[:, :1], BYTES[:, :1]),
        "grey last": (BYTES[:, 0, :, :, None], BYTES[:, :1]),
    }[layout]
    arrays = saved(tmp_path / "x.npz", np.array(images, order=order), write=write)
    assert is_mapped(arrays) == (write is np.savez)
    assert arrays.labels.tolist() == LABELS.tolist() and arrays.names is None
    for number in (5, 0, 3):
        image, label = arrays.read(number, wanted.shape[1])
        assert image.dtype == torch.uint8 and (image.numpy() == wanted[number]).all()
        assert label == LABELS[number]


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_floats_of_any_width_and_byte_order_become_float32(tmp_path, kind):
    values = (BYTES / 255).astype(kind)
    arrays = saved(tmp_path / "x.npz", values)
    image, _ = arrays.read(4, 3)
    assert is_mapped(arrays) and image.dtype == torch.float32
    assert (image.numpy() == values[4].astype(np.float32)).all()


def test_labels_of_any_width_and_byte_order_are_numbers(tmp_path):
    for kind in ("u1", ">i2", "<i4", ">i8", "u8"):
        arrays = saved(tmp_path / "x.npz", BYTES, LABELS.astype(kind))
        assert arrays.labels.dtype == torch.int64 and arrays.labels.tolist() == LABELS.tolist()


def test_names_are_numbered_in_their_alphabetical_order(tmp_path):
    arrays = saved(tmp_path / "x.npz", BYTES, np.array(["b", "a", "ä", "b", "a", "c"]))
    assert arrays.names == ["a", "b", "c", "ä"] and arrays.labels.tolist() == [1, 0, 3, 1, 0, 2]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("more", [b"", b"\x01\x00\x04\x00four"])
def test_every_version_of_a_header_is_read_and_what_else_stands_in_the_zip(tmp_path, version, more):
    def member(values):
        file = io.BytesIO()
        np.lib.format.write_array(file, values, version=version)
        return file.getvalue()

    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in (("labels", LABELS), ("images", BYTES)):
            info = zipfile.ZipInfo(f"{name}.npy")
            info.extra = more
            with archive.open(info, "w", force_zip64=version == (2, 0)) as file:
                file.write(member(values))
    arrays = image_arrays(path)
    assert is_mapped(arrays) and (arrays.read(5, 3).image.numpy() == BYTES[5]).all()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_set_goes_to_other_processes_without_its_file(tmp_path, write):
    images = np.zeros((500, 20, 20), np.uint8)
    images[:, 0, 0] = np.arange(500) % 256
    arrays = saved(tmp_path / "x.npz", images, np.arange(500), write)
    sent = pickle.dumps(arrays)
    assert (len(sent) < images.size / 2) == (write is np.savez)
    again = pickle.loads(sent)
    assert is_mapped(again) == is_mapped(arrays)
    assert again.read(499, 1).image[0, 0, 0] == 499 % 256
    assert again.fingerprint == arrays.fingerprint and len(again) == 500


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first = saved(tmp_path / "x.npz", BYTES).fingerprint
    assert saved(tmp_path / "y.npz", BYTES).fingerprint == first
    changed = BYTES.copy()
    changed[3, 2, 1, 0] ^= 1
    assert saved(tmp_path / "x.npz", changed).fingerprint != first
    assert saved(tmp_path / "x.npz", BYTES, LABELS % 2).fingerprint != first


def test_labels_may_be_whole_numbers_that_were_saved_as_floats(tmp_path):
    found = saved(tmp_path / "x.npz", BYTES, LABELS.astype(np.float32))
    assert found.labels.tolist() == LABELS.tolist() and found.labels.dtype == torch.int64


def test_grey_is_repeated_and_colours_are_not_mixed(tmp_path):
    image, _ = saved(tmp_path / "x.npz", BYTES[:, 0]).read(1, 3)
    assert (image.numpy() == BYTES[1, 0]).all() and image.shape == (3, 4, 5)
    with pytest.raises(DataError, match="must have 1 channels for this model, got 3"):
        saved(tmp_path / "x.npz", BYTES).read(1, 1)


@pytest.mark.parametrize("value", [-0.1, 1.1, 255, float("nan"), float("inf")])
def test_floats_outside_of_0_to_1_are_unreadable_by_their_number(tmp_path, value):
    images = np.full((6, 4, 4), 0.5, np.float32)
    images[2, 1, 1] = value
    arrays = saved(tmp_path / "x.npz", images)
    assert arrays.read(1, 1).image.max() == 0.5
    with pytest.raises(UnreadableImage, match=r"image 2 in .*x\.npz must be (finite|floats)"):
        arrays.read(2, 1)


@pytest.mark.parametrize(("images", "labels", "match"), [
    (BYTES[:0], LABELS[:0], "and some, got 0 and 0"),
    (BYTES, LABELS[:5], "as many images as labels, and some, got 6 and 5"),
    (BYTES.astype(np.int32), LABELS, "must be uint8 or floats in .*, got int32"),
    (BYTES, LABELS + 0.5, "one axis of whole numbers or strings, got float64"),
    (BYTES, np.full(6, np.nan), "one axis of whole numbers or strings, got float64"),
    (BYTES, np.eye(6, dtype=int), r"whole numbers or strings, got int64 of shape \(6, 6\)"),
    (BYTES, LABELS - 1, "must be at least 0, got -1"),
    (BYTES, np.full(6, 2**63, np.uint64), "must be below 2[*][*]63, got 9223372036854775808"),
    (BYTES[:, :2], LABELS, r"must have 1 or 3 channels, got shape \(6, 2, 4, 5\)"),
    (BYTES[0, 0, :, :, None].repeat(6, 2)[0], LABELS[:5], "must have 1 or 3 channels"),
    (BYTES[:, :, :, :0], LABELS, "at least one pixel"),
])  # fmt: skip
def test_other_arrays_are_refused(tmp_path, images, labels, match):
    with pytest.raises(DataError, match=match):
        saved(tmp_path / "x.npz", images, labels)
    with pytest.raises(DataError, match=match):
        ImageArrays("x", images, labels, fingerprint="", origin="here")


def test_files_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        image_arrays(path)
    with path.open("wb") as file:
        np.save(file, BYTES)
    with pytest.raises(DataError, match=r"must be an \.npz file"):
        image_arrays(path)
    np.savez(path, x=BYTES, y=LABELS)
    with pytest.raises(DataError, match=r"'images' and 'labels', got \['x', 'y'\]"):
        image_arrays(path)
    np.savez(path, images=np.array([None, {}]), labels=np.array([0, 1]))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        image_arrays(path)
    np.savez(path, images=BYTES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match=r"must be an \.npz file"):
        image_arrays(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("array", ["images", "labels"])
def test_a_bit_that_changed_in_a_file_is_noticed_when_it_is_opened(tmp_path, array, write):
    path = tmp_path / "x.npz"
    saved(path, BYTES, write=write)
    held = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{array}.npy")
        at = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    held[at + 30] ^= 1
    path.write_bytes(held)
    with pytest.raises(DataError, match=r"x\.npz (is damaged|cannot be read as)"):
        image_arrays(path)


def test_larger_arrays_are_not_read_to_be_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("ironmoe.attacks.data.arrays.LARGEST_CHECKED", BYTES.nbytes)
    path = tmp_path / "x.npz"
    saved(path, BYTES)
    held = path.read_bytes()
    path.write_bytes(held.replace(BYTES[3].tobytes(), bytes(BYTES[3].nbytes)))
    assert path.read_bytes() != held
    assert image_arrays(path).read(3, 3).image.max() == 0
