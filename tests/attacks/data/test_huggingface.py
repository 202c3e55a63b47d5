"""Data sets that Hugging Face's package saved on the disk."""

import pickle

import numpy as np
import pytest
import torch
from pictures import encoded, noise
from PIL import Image

from ironmoe.attacks.data import DataError, SavedImages, UnreadableImage, saved_dataset
from ironmoe.attacks.data.huggingface import is_saved_dataset

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def dataset(numbers, labels=None, names=("b", "a", "c"), **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    features |= {name: datasets.Value("int64") for name in columns}
    held = [{"bytes": encoded(noise(6, 5, seed=n), "PNG"), "path": None} for n in numbers]
    labels = [n % len(names) for n in numbers] if labels is None else labels
    return datasets.Dataset.from_dict(
        {"image": held, "label": labels, **columns}, datasets.Features(features)
    )


def check(images, numbers):
    assert len(images) == len(numbers)
    for place in (*range(len(numbers)), 0):
        picture, label = images.read(place, 3)
        assert np.array_equal(picture, noise(6, 5, seed=numbers[place]))
        assert label == int(images.labels[place])


def test_a_saved_data_set_gives_its_images_names_and_labels(tmp_path):
    dataset(range(7)).save_to_disk(tmp_path / "s")
    images = saved_dataset(tmp_path / "s")
    check(images, list(range(7)))
    assert images.names == ["b", "a", "c"] and images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert images.name == "s" and images.where(3) == "row 3 of s"
    assert is_saved_dataset(tmp_path / "s") and not is_saved_dataset(tmp_path)


def test_a_split_of_several_is_named(tmp_path):
    splits = {"train": dataset([9]), "validation": dataset([1, 2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "s")
    images = saved_dataset(tmp_path / "s", split="validation")
    check(images, [1, 2])
    assert images.name == "s validation" and is_saved_dataset(tmp_path / "s")
    for split in (None, "test"):
        with pytest.raises(DataError, match="must be one of train, validation, got"):
            saved_dataset(tmp_path / "s", split=split)

    datasets.DatasetDict({"only": dataset([4])}).save_to_disk(tmp_path / "one")
    check(saved_dataset(tmp_path / "one"), [4])
    check(saved_dataset(tmp_path / "one" / "only"), [4])


def test_rows_that_were_chosen_and_put_in_another_order_stay_so(tmp_path):
    dataset(range(7)).select([6, 2, 2]).save_to_disk(tmp_path / "s")
    check(saved_dataset(tmp_path / "s"), [6, 2, 2])
    check(SavedImages(dataset(range(7)).select([6, 2, 2])), [6, 2, 2])


def test_pictures_are_decoded_here_whatever_format_the_data_set_has(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (4, 2))
    held = [{"bytes": encoded(clear, "PNG", exif=exif), "path": None}]
    features = datasets.Features({"image": datasets.Image(mode="L"),
                                  "label": datasets.Value("string")})  # fmt: skip
    given = datasets.Dataset.from_dict({"image": held, "label": ["x"]}, features)
    for formatted in (given, given.with_format("torch"), given.with_transform(lambda row: 1 / 0)):
        images = SavedImages(formatted)
        picture = images.read(0, 3).image
        assert picture.size == (2, 4) and np.asarray(picture).min() == 255
        assert images.names == ["x"]


def test_bytes_and_files_that_are_no_pictures_are_unreadable(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    held = [{"bytes": b"?", "path": None}, {"bytes": None, "path": "nowhere.png"}, None]
    given = datasets.Dataset.from_dict({"image": held, "label": [0, 1, 2]}, features)
    for number, match in enumerate(["row 0 of datasets cannot", r"nowhere\.png", "got neither"]):
        with pytest.raises(UnreadableImage, match=match):
            SavedImages(given).read(number, 3)
    with pytest.raises(UnreadableImage) as caught:
        SavedImages(given).read(0, 3)
    assert " at 0x" not in str(caught.value)  # which is another one in each run


def test_columns_that_are_not_clear_are_refused():
    given = dataset([0, 1], x=[1, 2])
    assert SavedImages(given).labels.tolist() == [0, 1]  # the only one with names of classes
    assert SavedImages(given, label="x").labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="got 'img'; its columns are image"):
        SavedImages(given, image="img")
    with pytest.raises(DataError, match="a label for each image, got -1 in row 1"):
        SavedImages(dataset([0, 1], [0, -1]))
    with pytest.raises(DataError, match="must hold images, got none"):
        SavedImages(dataset([]))


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    for path in (tmp_path / "x", tmp_path / "nowhere"):
        with pytest.raises(DataError, match="must be a folder that save_to_disk of datasets wrote"):
            saved_dataset(path)


def test_the_fingerprint_is_that_of_the_data_set_and_its_labels(tmp_path):
    dataset(range(4)).save_to_disk(tmp_path / "a")
    dataset(range(4), [0, 1, 2, 1], x=[0] * 4).save_to_disk(tmp_path / "b")
    first = saved_dataset(tmp_path / "a").fingerprint
    assert saved_dataset(tmp_path / "a").fingerprint == first
    others = [saved_dataset(tmp_path / "b", label=label).fingerprint for label in ("label", "x")]
    assert len({first, *others}) == 3


def test_a_set_goes_to_other_processes_without_its_files(tmp_path):
    dataset([n % 50 for n in range(2000)]).save_to_disk(tmp_path / "s")
    images = saved_dataset(tmp_path / "s")
    sent = pickle.dumps(images)
    assert len(sent) < 50_000  # 16,000 of labels
    again = pickle.loads(sent)
    assert torch.equal(again.labels, images.labels)
    assert np.array_equal(again.read(1234, 3).image, noise(6, 5, seed=1234 % 50))
