"""Folders that have sub-folders with images, and a table, too: which of them has the labels."""

import json

import pytest
from PIL import Image

from ironmoe.attacks.data import DataError
from ironmoe.bench.data.sets import open_set

FILES = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
TABLE = {file: number for number, file in enumerate(FILES)}


@pytest.fixture
def folder(tmp_path):
    for number, file in enumerate(FILES):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / file)
    return tmp_path


def lines(listed):
    return "file_name,label\n" + "".join(f"{file},{label}\n" for file, label in listed.items())


@pytest.mark.parametrize(("name", "text", "count"), [
    ("labels.txt", "cat\ndog\n", "none"),
    ("labels.txt", "0 cat\n1 dog\n", "none"),
    ("labels.json", json.dumps({"cat": 0, "dog": 1}), "none"),
    ("metadata.json", json.dumps({"license": "CC0", "authors": ["a"]}), "none"),
    ("metadata.csv", lines({"cat/0.png": 7, "dog/1.png": 7}), "2"),
    ("labels.csv", lines({"cat/9.png": 1}), "none"),
    ("labels.csv", b"\xff\xfe no text", "none"),
])  # fmt: skip
def test_a_file_that_is_not_about_all_images_leaves_sub_folders_to_be_the_classes(
    folder, name, text, count
):
    before = open_set(str(folder)).fingerprint
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = open_set(str(folder))
    assert found.names == ["cat", "dog"] and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.fingerprint == before and found.notes == [
        f"{name} was not used, since it lists {count} of the images and the sub-folders are "
        f"classes; --labels {folder / name} takes it."
    ]


def test_the_table_counts_where_it_is_named(folder):
    table = folder / "metadata.csv"
    table.write_text(lines({"cat/0.png": 7, "dog/1.png": 6}))
    for found in (open_set(str(folder), table), open_set(str(table))):
        assert found.labels.tolist() == [7, 6] and found.names is None


@pytest.mark.parametrize("listed", [
    TABLE,
    dict(list(TABLE.items())[:3]),  # one folder, as of "train" beside "test"
])  # fmt: skip
def test_a_table_of_all_images_of_a_sub_folder_counts(folder, listed):
    (folder / "metadata.csv").write_text(lines(listed))
    found = open_set(str(folder))
    assert found.files == list(listed) and found.labels.tolist() == list(listed.values())


def test_a_table_of_images_beside_the_sub_folders_counts(folder):
    for number in range(2):
        Image.new("RGB", (4, 3)).save(folder / f"{number}.png")
    (folder / "labels.csv").write_text("0.png,5\n")
    found = open_set(str(folder))
    assert found.files == ["0.png"] and found.labels.tolist() == [5]
    (folder / "labels.csv").write_text("0.png,5\n7.png,5\n")
    with pytest.raises(DataError, match=r"1 that are not there, the first '7\.png'"):
        open_set(str(folder))


def test_of_several_files_the_one_that_lists_images_counts(folder):
    (folder / "labels.txt").write_text("cat\ndog\n")
    (folder / "metadata.csv").write_text(lines(TABLE))
    assert open_set(str(folder)).labels.tolist() == list(TABLE.values())
    (folder / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "label": 1}\n')
    with pytest.raises(DataError, match=r"one table of labels, .* got \['metadata.csv', 'metadata"):
        open_set(str(folder))
