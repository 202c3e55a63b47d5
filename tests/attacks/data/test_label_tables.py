"""Flat folders with tables of labels."""

import json

import pytest
from pictures import noise

from ironmoe.attacks.data import DataError, UnreadableImage, labelled_files, match_classes

FILES = ("a.png", "b b.png", "sub/c.JPEG", "d.png")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(FILES):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(3, 3, seed=number).save(path)
    return tmp_path / "set"


def read(folder, name, text, **options):
    path = folder / name
    path.write_bytes(text.encode(options.pop("encoding", "utf-8")))
    return labelled_files(folder, path)


WANTED = [("b b.png", 1), ("a.png", 0), ("sub/c.JPEG", 12)]
TABLES = {
    "csv": ("t.csv", "b b.png,1\na.png,0\nsub/c.JPEG,12\n"),
    "csv with a header": ("t.csv", "filename,label\nb b.png,1\na.png,0\nsub/c.JPEG,12\n"),
    "other columns": ("t.csv", "w,Label,h,File\n9,1,9,b b.png\n9,0,9,a.png\n9,12,9,sub/c.JPEG\n"),
    "quotes": ("t.csv", '"b b.png","1"\n"a.png","0"\n"sub/c.JPEG","12"\n'),
    "BOM": ("t.csv", "\ufefffile,label\nb b.png,1\na.png,0\nsub/c.JPEG,12\n"),
    "semicolons alone": ("t.csv", "b b.png;1\na.png;0\nsub/c.JPEG;12\n"),
    "semicolons": ("t.csv", "file;label\nb b.png;1\na.png;0\nsub/c.JPEG;12\n"),
    "Windows": ("t.csv", "file,label\r\nb b.png,1\r\na.png,0\r\nsub\\c.JPEG,12\r\n"),
    "old Mac": ("t.csv", "file,label\rb b.png,1\ra.png,0\rsub/c.JPEG,12\r"),
    "no last line end": ("t.csv", "b b.png,1\na.png,0\nsub/c.JPEG,12"),
    "empty lines": ("t.csv", "\nb b.png,1\n\n , \na.png,0\nsub/c.JPEG,12\n\n"),
    "spaces": ("t.csv", "file, label\nb b.png, 1\na.png , 0\nsub/c.JPEG, 12\n"),
    "floats": ("t.csv", "file,label\nb b.png,1.0\na.png,0.0\nsub/c.JPEG,12.0\n"),
    "without endings": ("t.csv", "id,label\nb b,1\na,0\nsub/c,12\n"),
    "dots": ("t.csv", "./b b.png,1\n./a.png,0\nsub/../sub/c.JPEG,12\n"),
    "exponents": ("t.csv", "b b.png,1.000e+00\na.png,0e0\nsub/c.JPEG,1.2E1\n"),
    "points": ("t.csv", "b b.png,1.\na.png,.0\nsub/c.JPEG,+12\n"),
    "tsv": ("t.tsv", "b b.png\t1\na.png\t0\nsub/c.JPEG\t12\n"),
    "tabs in csv": ("t.csv", "file\tlabel\nb b.png\t1\na.png\t0\nsub/c.JPEG\t12\n"),
    "tabs in txt": ("t.txt", "b b.png\t1\na.png\t0\nsub/c.JPEG\t12\n"),
    "commas in txt": ("t.txt", "b b.png,1\na.png,0\nsub/c.JPEG,12\n"),
    "caffe": ("val.txt", "b b.png 1\na.png 0\nsub/c.JPEG 12\n"),
    "caffe on Windows": ("val.txt", "b b.png  1\r\na.png 0 \r\nsub\\c.JPEG 12\r\n"),
    "json": ("t.json", '{"b b.png": 1, "a.png": "0", "sub/c.JPEG": 12.0}'),
    "json list": ("t.json", '[["b b.png", 1], ["a.png", 0], ["sub/c.JPEG", 12]]'),
    "json objects": ("t.json", json.dumps([{"file": f, "y": 0, "label": n} for f, n in WANTED])),
    "metadata": ("metadata.jsonl", "".join(json.dumps({"file_name": f, "label": n}) + "\n"
                                           for f, n in WANTED)),
    "capitals": ("T.CSV", "FileName,Class\nb b.png,1\na.png,0\nsub/c.JPEG,12\n"),
}  # fmt: skip


@pytest.mark.parametrize("form", TABLES)
def test_each_form_of_a_table_gives_the_same_files_and_labels_in_its_order(folder, form):
    images = read(folder, *TABLES[form])
    assert list(zip(images.files, images.labels.tolist(), strict=True)) == WANTED
    assert images.names is None
    assert images.notes == [f"1 images are left out, because {TABLES[form][0]} does not list them."]


def test_names_are_numbered_in_their_alphabetical_order(folder):
    for name, text in (
        ("t.csv", "d.png,zebra\na.png,cat\nb b.png,zebra\nsub/c.JPEG,guinea pig"),
        ("t.txt", "d.png zebra\na.png cat\nb b.png zebra\nsub/c.JPEG guinea pig"),
        ("t.json", '{"d": "zebra", "a": "cat", "b b": "zebra", "sub/c": "guinea pig"}'),
    ):
        images = read(folder, name, text)
        assert images.names == ["cat", "guinea pig", "zebra"]
        assert images.labels.tolist() == [2, 0, 2, 1] and images.notes == []
        assert images.read(1, 3).label == 0


def test_a_file_that_is_listed_again_counts_once_and_is_told(folder):
    images = read(folder, "t.csv", "b b.png,1\na.png,0\nb b,1.0\nsub/c.JPEG,12\nd,3\na,0\n")
    assert images.files == ["b b.png", "a.png", "sub/c.JPEG", "d.png"]
    assert images.labels.tolist() == [1, 0, 12, 3]
    assert images.notes == ["2 lines of t.csv list a file again, with the same label."]


def test_labels_below_0_are_names_in_the_order_of_their_numbers(folder):
    """No logit has such an index. A class map may name one."""
    images = read(folder, "t.csv", "d.png,10\na.png,-1\nb b.png,2.0\nsub/c.JPEG,-1\n")
    assert images.names == ["-1", "2", "10"] and images.labels.tolist() == [2, 0, 1, 0]
    assert images.notes == ["Labels of t.csv begin at -1, so they are names of classes."]
    found = match_classes(images.names, images.labels, 3, class_map={"-1": 0, "2": 2, "10": 1})
    assert found.logits[images.labels].tolist() == [1, 0, 2, 0]
    with pytest.raises(DataError, match="got -1 … 10"):
        match_classes(images.names, images.labels, 3)


def test_semicolons_may_part_columns_where_names_of_files_have_commas(folder):
    noise(3, 3).save(folder / "x,y.png")
    images = read(folder, "t.csv", "x,y.png;1\na.png;0\n")
    assert images.files == ["x,y.png", "a.png"] and images.labels.tolist() == [1, 0]


def test_linked_folders_are_followed_and_none_for_ever(folder, tmp_path):
    (tmp_path / "more").mkdir()
    noise(3, 3).save(tmp_path / "more" / "e.png")
    (folder / "link").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "round").symlink_to(folder)
    assert read(folder, "t.csv", "link/e,1\n").files == ["link/e.png"]
    assert "4 images are left out" in read(folder, "t.csv", "link/e,1\n").notes[0]


def test_a_listed_link_to_nowhere_is_an_image_that_cannot_be_read(folder):
    (folder / "e.png").symlink_to(folder / "nowhere.png")
    images = read(folder, "t.csv", "a.png,1\ne.png,0\n")
    with pytest.raises(UnreadableImage, match=r"e\.png cannot be read"):
        images.read(1, 3)


def test_the_boxes_of_kaggle_are_left_out(folder):
    text = (
        "ImageId,PredictionString\n"
        "b b,n01440764 111 22 333 444 \n"
        "a,n03017168 0 38 1 2 n03017168 5 6 7 8 n03017168 5 6 7 9 \n"
        "sub/c,n01440764 1 2 3 4\n"
    )
    images = read(folder, "LOC_val_solution.csv", text)
    assert images.names == ["n01440764", "n03017168"] and images.labels.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="one for each file, got n01440764 and n03017168"):
        read(folder, "t.csv", "file,label\na,n01440764 1 2 3 4 n03017168 1 2 3 4\n")


def test_odd_names_of_files_are_found(folder):
    names = ["1", "naïve 🐈 7.png", "x,y.png", "p 3 4.png", "u\u2028v.png", "semi;colon.png"]
    for name in names[1:]:
        noise(3, 3).save(folder / name)
    noise(3, 3).save(folder / "1.png")
    lines = [f'"{name}",{number}' for number, name in enumerate(names)]
    images = read(folder, "t.csv", "\n".join(["file,label", *lines]))
    assert images.files == ["1.png", *names[1:]] and images.labels.tolist() == list(range(6))
    images = read(folder, "t.txt", "\n".join(f"{n} {i}" for i, n in enumerate(names)))
    assert images.files == ["1.png", *names[1:]] and images.labels.tolist() == list(range(6))


def test_whole_paths_are_those_below_the_folder(folder):
    images = read(folder, "t.csv", f"{folder}/a.png,1\n{folder}/sub/c.JPEG,0\n")
    assert images.files == ["a.png", "sub/c.JPEG"]


def test_names_that_look_like_numbers_or_begin_with_them_are_names(folder):
    images = read(folder, "t.csv", "a.png,3.5\nd.png,cat\n")
    assert images.names == ["3.5", "cat"]
    images = read(folder, "t.txt", "a.png 3 toed sloth\nd.png cat\n")
    assert images.names == ["3 toed sloth", "cat"]


@pytest.mark.parametrize("name", ["labels.csv", "labels.txt", "metadata.jsonl", "metadata.csv"])
def test_a_table_with_a_usual_name_is_found(folder, name):
    text = '{"file_name": "a.png", "label": 3}\n' if name.endswith("l") else "a.png,3\n"
    (folder / name).write_text(text)
    assert labelled_files(folder).labels.tolist() == [3]
    (folder / "labels.tsv").write_text(text)
    with pytest.raises(DataError, match=r"must hold one table of labels, .* got \["):
        labelled_files(folder)


def test_a_folder_without_a_table_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"must hold one table of labels, .* got none"):
        labelled_files(folder)
    with pytest.raises(DataError, match="a folder of images must exist"):
        labelled_files(tmp_path / "nowhere", folder / "t.csv")
    with pytest.raises(DataError, match="cannot be read as a table of labels"):
        labelled_files(folder, folder / "t.csv")


@pytest.mark.parametrize(("name", "text", "match"), [
    ("t.csv", "", "must list files with their labels"),
    ("t.csv", "file,label\n", "must list files with their labels"),
    ("t.csv", "a.png\n", "a file and a label in each line"),
    ("t.csv", "a.png,0\nb b.png\n", r"in each line, got \['b b.png'\]"),
    ("t.csv", "a.png,0\nnone.png,1\nno.png,1\n", "got 2 that are not there, the first 'none.png'"),
    ("t.csv", "picture,breed\na.png,0\n", "first 'picture'. If its first line names the columns"),
    ("t.csv", "a.png,0\na.png,1\n", "each file with one label, got 'a.png' with 0 and 1"),
    ("t.csv", "a.png,0\na,1\n", "each file with one label, got 'a' with 0 and 1"),
    ("t.csv", "a.png,0\nd.png,cat\n", "all be whole numbers or all be names, got 0 and 'cat'"),
    ("t.csv", "a.png,1.0\na,2\n", "each file with one label, got 'a' with 1 and 2"),
    ("t.csv", "a.png,cat\na,dog\n", "each file with one label, got 'a' with 'cat' and 'dog'"),
    ("t.csv", "a.png,1\nd.png,3.5\n", "whole numbers or names, got 3.5 of 'd.png'"),
    ("t.csv", "a.png,0.5\nd.png,4.5\n", "whole numbers or names, got 0.5 of 'a.png'"),
    ("t.csv", "a.png,1\nd.png,nan\n", "whole numbers or names, got nan of 'd.png'"),
    ("t.csv", "a.png,-Infinity\nd.png,1e0\n", "whole numbers or names, got -inf of 'a.png'"),
    ("t.csv", "a.png,9223372036854775808\n", "within 64 bits, got 9223372036854775808 of 'a.png'"),
    ("t.json", '{"a.png": NaN}', "whole numbers or names, got nan of 'a.png'"),
    ("t.json", '{"a.png": 1e30}', "must be within 64 bits, got 1"),
    ("t.json", '{"a.png": 3, "d.png": "cat"}', "all be whole numbers or all be names, got 3 and"),
    ("t.txt", "file label\na.png 7 cat\n", "got '7 cat' as a label, which is a number and a na"),
    ("t.txt", "a.png 0 cat\nd.png 1 dog\n", "got '0 cat' as a label, which is a number and a na"),
    ("t.csv", "a.png,\n", "must be whole numbers or names, got an empty one"),
    ("t.json", '{"a.png": 0, "a.png": 1}', "got 'a.png' with 0 and 1"),
    ("t.json", '{"a.png": true}', "whole numbers or names, got True"),
    ("t.json", '{"a.png": [0, 1]}', r"whole numbers or names, got \[0, 1\]"),
    ("t.json", '{"a.png": 0.5}', "whole numbers or names, got 0.5"),
    ("t.json", '[{"file": "a.png", "text": "a cat"}]', "must be an object from file to label"),
    ("t.json", '{"a.png": ', "cannot be read as a table of labels"),
    ("t.xlsx", "a.png,0", r"must end in \.csv"),
])  # fmt: skip
def test_tables_that_say_something_else_are_refused(folder, name, text, match):
    with pytest.raises(DataError, match=match):
        read(folder, name, text)


def test_a_table_in_another_encoding_is_refused(folder):
    with pytest.raises(DataError, match="cannot be read as a table of labels: 'utf-8'"):
        read(folder, "t.csv", "a.png,0\n", encoding="utf-16")


def test_a_name_without_its_ending_must_mean_one_file(folder):
    noise(3, 3).save(folder / "a.bmp")
    with pytest.raises(DataError, match=r"got 'a', which may be \['a.bmp', 'a.png'\]"):
        read(folder, "t.csv", "a,0\n")
    assert read(folder, "t.csv", "a.png,0\n").files == ["a.png"]
