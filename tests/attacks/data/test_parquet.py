"""Parquet files: which columns count, which files are a split, and how little is held."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from pictures import encoded, noise

from ironmoe.attacks.data import DataError, UnreadableImage, parquet_images
from ironmoe.attacks.data.parquet import ROWS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PICTURES = [encoded(noise(6, 5, seed=seed), "PNG") for seed in range(50)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def cells(numbers):
    return pa.array([{"bytes": PICTURES[n], "path": f"{n}.png"} for n in numbers], STRUCT)


def table(numbers, labels=None, **columns):
    labels = [n % 3 for n in numbers] if labels is None else labels
    return pa.table({"image": cells(numbers), "label": labels, **columns})


def with_names(written, names):
    """As Hugging Face's package writes the names of classes beside a table."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    told = json.dumps({"info": {"features": features}})
    return written.replace_schema_metadata({b"huggingface": told.encode()})


def check(images, numbers):
    """Every image is the one of its number, in whatever order it is asked for."""
    assert len(images) == len(numbers)
    for place in [*range(len(numbers)), *reversed(range(len(numbers))), 7 % len(numbers)]:
        picture, label = images.read(place, 3)
        assert np.array_equal(picture, noise(6, 5, seed=numbers[place])), place
        assert label == int(images.labels[place])


@pytest.mark.parametrize("group", [3, 20, 50])
def test_rows_are_read_in_any_order_whatever_the_row_groups(tmp_path, group):
    pq.write_table(table(range(50)), tmp_path / "x.parquet", row_group_size=group)
    images = parquet_images(tmp_path / "x.parquet")
    assert images.names is None and images.name == "x"
    check(images, list(range(50)))
    assert images.where(41) == f"row 41 of {tmp_path / 'x.parquet'}"


def test_files_follow_each_other_by_their_names_and_empty_ones_are_passed_over(tmp_path):
    for name, numbers in (("b", range(10, 15)), ("a", range(4)), ("aa", range(0)), ("c", [20])):
        pq.write_table(table(numbers, pa.array([n % 3 for n in numbers], pa.int64())),
                       tmp_path / f"{name}.parquet", row_group_size=2)  # fmt: skip
    images = parquet_images(tmp_path)
    check(images, [0, 1, 2, 3, 10, 11, 12, 13, 14, 20])
    assert images.where(6) == f"row 2 of {tmp_path / 'b.parquet'}"


@pytest.mark.parametrize("column", [
    pa.array(PICTURES[:4], pa.binary()), pa.array(PICTURES[:4], pa.large_binary()), cells(range(4)),
])  # fmt: skip
@pytest.mark.parametrize("labels", [
    pa.array([2, 0, 1, 1], pa.uint8()), pa.array([2, 0, 1, 1]),
    pa.array(["c", "a", "b", "b"]), pa.array(["c", "a", "b", "b"], pa.large_string()),
    pa.array(["c", "a", "b", "b"]).dictionary_encode(),
])  # fmt: skip
def test_every_type_of_column_is_read(tmp_path, column, labels):
    pq.write_table(pa.table({"img": column, "fine_label": labels}), tmp_path / "x.parquet")
    images = parquet_images(tmp_path / "x.parquet")
    assert images.labels.tolist() == [2, 0, 1, 1]
    assert images.names == (None if pa.types.is_integer(labels.type) else ["a", "b", "c"])
    check(images, list(range(4)))


def test_names_of_classes_are_those_that_hugging_face_wrote(tmp_path):
    written = with_names(table(range(4), coarse=[9] * 4), ["zebra", "cat", "dog"])
    pq.write_table(written, tmp_path / "x.parquet")
    images = parquet_images(tmp_path / "x.parquet")
    assert images.names == ["zebra", "cat", "dog"] and images.labels.tolist() == [0, 1, 2, 0]


def test_a_class_column_counts_before_other_numbers(tmp_path):
    written = table(range(4), [1] * 4, class_=[0] * 4).rename_columns(["image", "x", "label"])
    features = {"x": {"names": ["a", "b"], "_type": "ClassLabel"}}
    told = json.dumps({"info": {"features": features}}).encode()
    pq.write_table(written.replace_schema_metadata({b"huggingface": told}), tmp_path / "x.parquet")
    assert parquet_images(tmp_path / "x.parquet").labels.tolist() == [1] * 4
    assert parquet_images(tmp_path / "x.parquet", label="label").labels.tolist() == [0] * 4


def test_paths_of_images_lie_below_the_folder_of_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    for number in (0, 1):
        (tmp_path / "deep" / f"{number}.png").write_bytes(PICTURES[number])
    column = pa.array([{"bytes": None, "path": f"deep/{n}.png"} for n in (0, 1)], STRUCT)
    pq.write_table(pa.table({"image": column, "label": [0, 1]}), tmp_path / "x.parquet")
    check(parquet_images(tmp_path / "x.parquet"), [0, 1])


def test_cells_without_a_picture_are_unreadable_by_their_row(tmp_path):
    column = pa.array([None, {"bytes": None, "path": None}, {"bytes": b"?", "path": None},
                       {"bytes": None, "path": "nowhere.png"}], STRUCT)  # fmt: skip
    pq.write_table(pa.table({"image": column, "label": [0] * 4}), tmp_path / "x.parquet")
    images = parquet_images(tmp_path / "x.parquet")
    for row, match in enumerate([
        "row 0 of .* got neither", "row 1 of .* got neither", "row 2 of .* cannot be read",
        r"nowhere\.png cannot be read",
    ]):  # fmt: skip
        with pytest.raises(UnreadableImage, match=match):
            images.read(row, 3)


@pytest.mark.parametrize("beside", [
    {}, {"id": [7, 8]}, {"__index_level_0__": [0, 1]}, {"split": ["x", "y"], "caption": ["x", "y"]},
])  # fmt: skip
@pytest.mark.parametrize("label", [
    {"label": [1.0, 0.0]}, {"Target": [1, 0]}, {"wnid": [1, 0]}, {"cls": ["b", "a"]},
    {"class": [1, 0], "wnid": ["a", "b"]},
])  # fmt: skip
def test_a_column_of_a_usual_name_has_the_labels_whatever_stands_beside_it(tmp_path, label, beside):
    columns = {"image": cells([0, 1])} | beside | label
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert parquet_images(tmp_path / "x.parquet").labels.tolist() == [1, 0]


def test_another_column_of_labels_is_noted(tmp_path):
    columns = {"image": cells([0, 1]), "coarse_label": [0, 0], "fine_label": [1, 0]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    images = parquet_images(tmp_path / "x.parquet")
    assert images.labels.tolist() == [1, 0]
    assert images.notes == [
        "Labels are the column 'fine_label'; 'coarse_label' is one, too, and label= takes another."
    ]
    assert parquet_images(tmp_path / "x.parquet", label="fine_label").notes == []


@pytest.mark.parametrize(("columns", "options", "match"), [
    ({"a": cells([0]), "b": cells([1]), "label": [0]}, {},
     r"must have one column of images, got 'a' and 'b'; name it by image=. Its columns are a \("),
    ({"image": cells([0]), "a": [0], "b": [1]}, {},
     r"one column of labels, got none of a usual name; name it by label=\. Its columns are image"),
    ({"image": cells([0]), "caption": ["a"]}, {}, "got none of a usual name; name it by label="),
    ({"image": cells([0]), "x": [0], "y": [1]}, {}, "got none of a usual name; name it by label="),
    ({"image": cells([0]), "wnid": ["a"], "synset": [1]}, {}, "got 'wnid' and 'synset'; name it"),
    ({"image": cells([0]), "label": [True], "split": ["a"]}, {},
     "one column of labels, got 'label' of type bool, which holds none; if another one does, name"),
    ({"image": cells([0]), "Labels": [[0]], "wnid": ["a"]}, {}, r"got 'Labels' of type list<"),
    ({"image": ["a.png"], "mask": cells([0]), "label": [0]}, {},
     "one column of images, got 'image' of type string, which holds none; .* name it by image="),
    ({"image": cells([0]), "label": [0], "labels": [1]}, {}, "got 'label' and 'labels'; name it"),
    ({"image": cells([0])}, {}, r"labels, got none of a usual name\. Its columns are image"),
    ({"x": [0.5], "label": [0]}, {}, r"images, got none of a usual name\. Its columns are x \(d"),
    ({"image": cells([0]), "label": [0.5]}, {}, "must be whole numbers or names, got 0.5"),
    ({"image": cells([0, 1]), "label": [0.0, None]}, {}, "a label for each image, got None in row"),
    ({"image": cells([0]), "label": [float("nan")]}, {}, "for each image, got nan in row 0"),
    ({"image": cells([0]), "image_id": [0]}, {}, "got none of a usual name; name it by label="),
    ({"image": cells([0]), "score": [1.0]}, {}, "got none of a usual name; name it by label="),
    ({"image": cells([0]), "label": [[0, 1]]}, {}, "got 'label' of type list<"),
    ({"image": cells([0]), "label": pa.array([2**63], pa.uint64())}, {},
     "must be below 2[*][*]63, got 9223372036854775808"),
    ({"image": cells([0]), "label": [0]}, {"image": "img"}, "image must be a column of images of"),
    ({"image": cells([0]), "label": [0]}, {"label": "image"}, "label must be a column of labels"),
    ({"image": cells([0, 1]), "label": [0, None]}, {}, "a label for each image, got None in row 1"),
    ({"image": cells([0, 1]), "label": [-1, -1]}, {}, "got -1 in row 0; a test set without labels"),
    ({"image": cells([0, 1]), "label": [0, -7]}, {}, "must be from 0 on, got values from -7 to 0"),
])  # fmt: skip
def test_columns_that_are_not_clear_are_refused(tmp_path, columns, options, match):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=match):
        parquet_images(tmp_path / "x.parquet", **options)


def test_names_of_classes_beside_a_column_say_that_it_has_the_labels(tmp_path):
    features = {"breed": {"names": ["a", "b"], "_type": "ClassLabel"}}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    columns = {"image": cells([0]), "breed": [1], "wnid": [0]}
    pq.write_table(pa.table(columns).replace_schema_metadata(told), tmp_path / "x.parquet")
    assert parquet_images(tmp_path / "x.parquet").names == ["a", "b"]
    columns |= {"label": [[0, 1]]}
    pq.write_table(pa.table(columns).replace_schema_metadata(told), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="got 'label' of type list<"):
        parquet_images(tmp_path / "x.parquet")
    assert parquet_images(tmp_path / "x.parquet", label="breed").labels.tolist() == [1]


def test_labels_beyond_the_names_of_the_classes_are_refused(tmp_path):
    pq.write_table(with_names(table(range(4)), ["a", "b"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="must be from 0 to 1, got values from 0 to 2"):
        parquet_images(tmp_path / "x.parquet")


def test_a_column_that_is_named_is_taken(tmp_path):
    written = pa.table({"a": cells([0]), "b": cells([1]), "x": [5], "y": [6]})
    pq.write_table(written, tmp_path / "x.parquet")
    images = parquet_images(tmp_path / "x.parquet", image="b", label="x")
    check(images, [1])
    assert images.labels.tolist() == [5]


@pytest.fixture
def splits(tmp_path):
    """The layout of Hugging Face's hub."""
    (tmp_path / "data").mkdir()
    for name, numbers in (("train-00000-of-00001", [9]), ("validation-00000-of-00002", [0, 1]),
                          ("validation-00001-of-00002", [2])):  # fmt: skip
        pq.write_table(table(numbers), tmp_path / "data" / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize("inside", [".", "data"])
def test_a_split_is_found_by_the_names_of_its_files(splits, inside):
    images = parquet_images(splits / inside, split="validation")
    check(images, [0, 1, 2])
    assert images.name.endswith(" validation")
    check(parquet_images(splits / inside, split="train"), [9])
    with pytest.raises(DataError, match=r"which files of .* meant, 'train' or 'validation', got"):
        parquet_images(splits / inside)
    with pytest.raises(
        DataError, match=r"split must be one of train, validation of .*, got 'test'"
    ):
        parquet_images(splits / inside, split="test")


def test_a_split_may_be_a_folder(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        (tmp_path / split).mkdir()
        pq.write_table(table([number]), tmp_path / split / "0000.parquet")
    check(parquet_images(tmp_path, split="test"), [2])


def test_files_without_numbers_may_be_splits_too(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        pq.write_table(table([number]), tmp_path / f"{split}.parquet")
    check(parquet_images(tmp_path, split="test"), [2])
    with pytest.raises(DataError, match="'test' or 'train', got none"):
        parquet_images(tmp_path)


def test_names_of_files_may_end_in_capital_letters(tmp_path):
    pq.write_table(table([1]), tmp_path / "A.PARQUET")
    check(parquet_images(tmp_path), [1])
    check(parquet_images(tmp_path / "A.PARQUET"), [1])


def test_half_a_download_is_refused(splits):
    (splits / "data" / "validation-00001-of-00002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"all 2 files of 'validation', got 1; the first .* number 1"
    ):
        parquet_images(splits, split="validation")


def test_files_of_a_set_must_have_the_same_columns_and_classes(tmp_path):
    pq.write_table(with_names(table([0, 1]), ["a", "b"]), tmp_path / "1.parquet")
    pq.write_table(with_names(table([0, 1]), ["b", "a"]), tmp_path / "2.parquet")
    with pytest.raises(DataError, match="must have the same columns and classes"):
        parquet_images(tmp_path)
    pq.write_table(table([0], ["a"]), tmp_path / "1.parquet")
    pq.write_table(table([0], [3]), tmp_path / "2.parquet")
    with pytest.raises(DataError, match="all numbers or all names, got both"):
        parquet_images(tmp_path)


def test_what_is_no_parquet_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="parquet files must exist, got"):
        parquet_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold parquet files, got none"):
        parquet_images(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as a parquet file"):
        parquet_images(tmp_path)
    empty = table(range(0), pa.array([], pa.int64()))
    pq.write_table(empty, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="must hold images, got none"):
        parquet_images(tmp_path)
    with pytest.raises(DataError, match="split must come with a folder"):
        parquet_images(tmp_path / "x.parquet", split="test")


def test_the_fingerprint_tells_other_files_from_the_same_ones_elsewhere(tmp_path):
    prints = []
    labels_of = {"a": [0, 1], "b": [0, 1], "c": [1, 0], "d": [0, 1, 0]}
    for folder, labels in labels_of.items():
        (tmp_path / folder).mkdir()
        pq.write_table(table(range(len(labels)), labels), tmp_path / folder / "x.parquet")
        prints.append(parquet_images(tmp_path / folder).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_few_rows_are_in_memory_however_large_a_row_group_is(tmp_path):
    """2,000 images of 20 kB in one row group: its 40 MB are not read as a whole."""
    noisy = np.random.default_rng(0).bytes(20_000)
    held = [PICTURES[0] + noisy[: 19_000 + n % 1000] for n in range(2000)]
    written = pa.table({"image": pa.array(held, pa.binary()), "label": [0] * 2000})
    path = tmp_path / "x.parquet"
    options = {"use_dictionary": False, "write_batch_size": 16}  # else a page has 1,024 rows
    pq.write_table(written, path, row_group_size=2000, **options)
    assert pq.ParquetFile(path).num_row_groups == 1
    del held, written

    images = parquet_images(path)
    before, most = pa.total_allocated_bytes(), 0
    for number in range(0, 2000, 5):
        images.read(number, 3)
        most = max(most, pa.total_allocated_bytes() - before)
    # Some rows, the pages that they lie in (1 MB each) and the buffer of the file (1 MB).
    assert 0 < most < 8e6, most
    assert len(images._cursor.batch) <= ROWS


def test_a_set_goes_to_other_processes_without_its_open_file(tmp_path):
    pq.write_table(table(range(50)), tmp_path / "x.parquet", row_group_size=7)
    images = parquet_images(tmp_path / "x.parquet")
    images.read(30, 3)
    again = pickle.loads(pickle.dumps(images))
    assert again._cursor is None and again.fingerprint == images.fingerprint
    check(again, list(range(50)))
    assert torch.equal(again.labels, images.labels)


def test_a_forked_process_opens_the_file_for_itself(tmp_path, monkeypatch):
    pq.write_table(table(range(50)), tmp_path / "x.parquet")
    images = parquet_images(tmp_path / "x.parquet")
    images.read(3, 3)
    mine = images._cursor
    monkeypatch.setattr(os, "getpid", lambda: -1)
    images.read(4, 3)
    assert images._cursor is not mine and images._cursor.file is not mine.file


def test_a_file_is_opened_once_for_all_of_its_row_groups(tmp_path):
    for name in ("a", "b"):
        pq.write_table(table(range(20)), tmp_path / f"{name}.parquet", row_group_size=3)
    images = parquet_images(tmp_path)
    files = []
    for number in range(40):
        images.read(number, 3)
        files.append(images._cursor.file)
    assert all(file is files[0] for file in files[:20])
    assert all(file is files[20] for file in files[20:]) and files[0] is not files[20]
