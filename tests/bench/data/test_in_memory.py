import numpy as np
import pytest
import torch
from PIL import Image

from ironmoe.attacks.data import DataError
from ironmoe.bench.data.in_memory import load_data


def make_folder(path, sizes=((10, 10),) * 3, mode="L", classes=("cat", "dog")):
    generator = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode=None).save(
                path / name / f"{i}.png"
            )
    return path


def test_mnist_is_all_there_and_never_changes():
    data = load_data("mnist")
    assert data.images.shape == (5000, 1, 28, 28) and data.images.dtype == torch.float32
    assert data.images.min() == 0 and data.images.max() == 1
    assert torch.bincount(data.labels).tolist() == [500] * 10
    assert data.checksum == "5d0d7eabb8c562db" + data.checksum[16:]


def test_digits():
    data = load_data("digits")
    assert (
        data.images.shape == (1797, 1, 8, 8) and data.images.max() == 1 and len(data.classes) == 10
    )


def test_images_of_one_class_are_refused(tmp_path):
    """By their labels, by the one folder that has images, and by a class that no split can have."""
    images = np.zeros((5, 8, 8, 1))
    for labels, message in {
        (3, 3, 3, 3, 3): "set must hold images of at least 2 classes, got 5 of class 3 alone",
        (0, 0, 0, 0, 1): "class '1' must have at least 2 images, one to train and one to test",
    }.items():
        np.savez(tmp_path / "set.npz", images=images, labels=np.array(labels))
        with pytest.raises(DataError, match=message):
            load_data(str(tmp_path / "set.npz")).split()

    folder = make_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(DataError, match="must hold images of at least 2 classes, got cat"):
        load_data(str(folder))


def test_split_is_stratified_disjoint_and_fixed():
    data = load_data("digits")
    train, test = data.split()
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))
    share = torch.bincount(data.labels[test]) / torch.bincount(data.labels)
    assert (share - 0.2).abs().max() < 0.01
    again = load_data("digits").split()
    assert torch.equal(train, again[0]) and torch.equal(test, again[1])
    # the first hundred are a sample of all classes
    assert torch.bincount(data.labels[test[:100]], minlength=10).min() > 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folder(tmp_path, mode):
    data = load_data(str(make_folder(tmp_path / "pets", mode=mode)))
    assert data.images.shape == (6, 3 if mode == "RGB" else 1, 10, 10)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.classes == ["cat", "dog"]
    with Image.open(tmp_path / "pets" / "dog" / "1.png") as image:
        expected = torch.from_numpy(np.array(image)).float() / 255
    torch.testing.assert_close(
        data.images[4], expected.permute(2, 0, 1) if mode == "RGB" else expected[None]
    )


def test_folder_of_mixed_sizes_is_resized(tmp_path):
    folder = make_folder(tmp_path / "pets", sizes=((100, 80), (10, 10), (33, 70)))
    assert load_data(str(folder)).images.shape == (6, 1, 32, 32)
    assert load_data(str(folder), image_size=20).images.shape == (6, 1, 20, 20)


def test_corrupt_image_is_named_and_can_be_skipped(tmp_path):
    folder = make_folder(tmp_path / "pets")
    bad = folder / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog/1\.png cannot be read.*--skip-bad"):
        load_data(str(folder))
    data = load_data(str(folder), skip_bad=True)
    assert data.skipped == [str(bad)] and len(data.images) == 5


def test_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="must hold one sub-folder"):
        load_data(str(tmp_path))
    make_folder(tmp_path / "pets")
    (tmp_path / "pets" / "eel").mkdir()
    with pytest.raises(DataError, match="eel must hold images"):
        load_data(str(tmp_path / "pets"))


@pytest.mark.parametrize("layout", [(10, 6, 6), (10, 6, 6, 3), (10, 3, 6, 6), (10, 6, 6, 1)])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_npz(tmp_path, layout, dtype):
    images = np.random.default_rng(0).random(layout)
    images = (images * 255).astype(np.uint8) if dtype == "uint8" else images
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(10) % 2 * 5)
    data = load_data(str(tmp_path / "set.npz"))
    assert data.images.shape == (10, 3 if 3 in layout else 1, 6, 6) and data.images.max() <= 1
    assert data.classes == list("012345") and data.labels.tolist() == [0, 5] * 5
    assert data.notes == [
        "Labels are indices of the logits: 4 of the 6 classes, 0 … 5, have no image."
    ]
    assert len(data.split()[0]) == 8  # a class without images is no obstacle


def test_a_label_below_0_is_no_index(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((10, 6, 6)), labels=np.arange(10) - 1)
    with pytest.raises(DataError, match="must be at least 0, got -1"):
        load_data(str(tmp_path / "set.npz"))


def test_one_grey_file_among_colour_ones_becomes_rgb(tmp_path):
    folder = make_folder(tmp_path / "pets", mode="RGB")
    Image.new("L", (10, 10), 100).save(folder / "cat" / "0.png")
    data = load_data(str(folder))
    assert data.images.shape == (6, 3, 10, 10)
    assert bool((data.images[0] == torch.tensor(100 / 255)).all())


def test_images_that_would_not_fit_into_memory_are_refused_before_any_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("ironmoe.bench.data.in_memory.LARGEST_BYTES", 1000)
    folder = make_folder(tmp_path / "pets")
    with pytest.raises(DataError, match=r"6 of 10 × 10 pixels need .* ironmoe attack takes any"):
        load_data(str(folder))


def test_npz_with_names(tmp_path):
    np.savez(
        tmp_path / "set.npz", images=np.zeros((4, 6, 6)), labels=np.array(["b", "a", "b", "a"])
    )
    data = load_data(str(tmp_path / "set.npz"))
    assert data.classes == ["a", "b"] and data.labels.tolist() == [1, 0, 1, 0]


GOOD = {"images": np.zeros((4, 6, 6)), "labels": np.array([0, 0, 1, 1])}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GOOD["images"]}, "must hold arrays 'images' and 'labels'"),
        (GOOD | {"labels": np.array([0, 1])}, "as many images as labels"),
        (GOOD | {"labels": np.array([0.5, 1, 0, 1])}, "whole numbers or strings"),
        (GOOD | {"labels": np.array([0, 1, None, 1], dtype=object)}, "cannot be read"),
        (GOOD | {"images": np.zeros((4, 6, 5))}, "must be square"),
        (
            GOOD | {"images": np.zeros((4, 0, 0))},
            r"must have at least one pixel, got \(4, 1, 0, 0\)",
        ),
        (
            GOOD | {"images": np.full((4, 6, 6), np.nan)},
            "image 0 in .*must be finite, got NaN or infinity",
        ),
        (
            GOOD | {"images": np.full((4, 6, 6), 7.0)},
            r"must be floats in \[0, 1\], got values from 7 to 7",
        ),
        (GOOD | {"images": np.zeros((4, 6, 6), dtype=np.int64)}, "must be uint8 or floats"),
        (
            {"images": np.zeros((0, 6, 6)), "labels": np.zeros(0, dtype=np.int64)},
            "as many images as labels, and some",
        ),
    ],
)
def test_bad_npz_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / "set.npz"))


def test_other_bad_specs_are_named(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"broken\.npz must be an .npz file"):
        load_data(str(tmp_path / "broken.npz"))
    with pytest.raises(
        DataError,
        match="data must be one of mnist, digits, or a folder with one sub-folder a class",
    ):
        load_data("cifar")
    np.savez(tmp_path / "one.npz", images=np.zeros((3, 6, 6)), labels=np.array([0, 0, 1]))
    with pytest.raises(DataError, match="class '1' must have at least 2 images"):
        load_data(str(tmp_path / "one.npz")).split()
