"""Folders with one sub-folder a class."""

import os
import pickle
import shutil

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from ironmoe.attacks.data import DataError, ImageFiles, UnreadableImage, image_folder


@pytest.fixture
def folder(tmp_path):
    names = {"b/2.png", "b/10.png", "a/x y.JPEG", "a/ünïcode 🐈.png", "a/B.png", "ä/1.bmp"}
    for number, name in enumerate(sorted(names)):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(4, 5, seed=number).save(path)
    return tmp_path / "set"


def test_classes_and_files_are_in_the_order_of_their_names(folder):
    images = image_folder(folder)
    assert images.names == ["a", "b", "ä"] and images.name == "set"
    assert images.files == ["a/B.png", "a/x y.JPEG", "a/ünïcode 🐈.png", "b/10.png", "b/2.png",
                            "ä/1.bmp"]  # fmt: skip
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert images.notes == [] and len(images) == 6


def test_an_image_is_read_with_its_label_and_named_by_its_file(folder):
    images = image_folder(folder)
    picture, label = images.read(3, 3)
    assert (np.asarray(picture) == np.asarray(noise(4, 5, seed=3))).all() and label == 1
    assert images.where(3) == str(folder / "b/10.png")
    assert images.read(3, 1).image.mode == "L"


def test_what_is_no_image_is_left_out_and_counted(folder):
    (folder / "a" / "notes.txt").write_text("")
    (folder / "a" / "Thumbs.db").write_text("")
    (folder / "a" / ".hidden.png").write_text("")
    (folder / "a" / "folder.png").mkdir()
    (folder / ".git").mkdir()
    (folder / "labels.csv").write_text("")
    images = image_folder(folder)
    assert len(images) == 6
    assert images.notes == [
        "Left out, since their names are not those of images: 1 × hidden, 1 × .db, 1 × .txt."
    ]


def test_the_fingerprint_tells_other_files_from_the_same_ones_elsewhere(folder, tmp_path):
    first = image_folder(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert image_folder(tmp_path / "copy").fingerprint == first

    with (folder / "b" / "2.png").open("ab") as file:
        file.write(b"!")
    changed = image_folder(folder).fingerprint
    (folder / "b" / "2.png").rename(folder / "a" / "2.png")
    assert len({first, changed, image_folder(folder).fingerprint}) == 3


def test_the_labels_are_in_the_fingerprint(folder):
    files = ["a/B.png", "b/2.png"]
    sets = [ImageFiles("s", folder, files, labels, None) for labels in ([0, 1], [1, 0], [0, 2])]
    assert len({images.fingerprint for images in sets}) == 3


def test_links_to_files_and_folders_are_followed(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c").symlink_to(folder / "b")
    (tmp_path / "linked" / "d").mkdir()
    (tmp_path / "linked" / "d" / "1.png").symlink_to(folder / "a" / "B.png")
    assert image_folder(tmp_path / "linked").files == ["c/10.png", "c/2.png", "d/1.png"]


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(folder):
    before = image_folder(folder).fingerprint
    (folder / "b" / "1.png").symlink_to(folder / "nowhere.png")
    images = image_folder(folder)
    assert images.files[3] == "b/1.png" and images.fingerprint != before
    with pytest.raises(UnreadableImage, match=r"b/1\.png cannot be read: .*No such file"):
        images.read(3, 3)
    assert images.read(4, 3).label == 1


def test_images_in_deeper_folders_belong_to_the_class_that_they_lie_in(folder):
    for name in ("b/1/9.png", "b/3.png", "b/1/.hidden/9.png", "b/.git/9.png", "b/1/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "b" / "2.png", folder / name)
    (folder / "b" / "1" / "round").symlink_to(folder / "b")  # it is not followed for ever
    images = image_folder(folder)
    assert images.files[3:7] == ["b/1/9.png", "b/10.png", "b/2.png", "b/3.png"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert images.notes == ["Left out, since their names are not those of images: 1 × .txt."]


def test_all_images_of_a_class_may_lie_in_a_folder_called_images(folder):
    (folder / "c" / "images").mkdir(parents=True)
    (folder / "c" / "boxes.txt").write_text("")
    shutil.copy(folder / "b" / "2.png", folder / "c" / "images" / "2.png")
    images = image_folder(folder)
    assert images.names == ["a", "b", "c", "ä"] and images.files[5] == "c/images/2.png"
    (folder / "c" / "images").rename(folder / "c" / "cats")
    with pytest.raises(DataError, match=r"folder .*c must hold images .* got none\. It holds fol"):
        image_folder(folder)


def test_images_beside_the_folders_of_classes_are_counted(folder):
    before = image_folder(folder).fingerprint
    for name in ("x.png", "y.PNG", ".hidden.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    images = image_folder(folder)
    assert images.fingerprint == before and images.notes == [
        "2 images are left out, because they lie beside the class folders."
    ]


def test_names_that_are_no_unicode_are_read(folder):
    odd = os.fsencode(folder / "a") + b"/\xff.png"
    try:
        shutil.copy(folder / "a" / "B.png", os.fsdecode(odd))
    except OSError:
        pytest.skip("the file system takes no such names")
    images = image_folder(folder)
    assert len(images) == 7 and images.files[3] == "a/\udcff.png"
    assert images.read(3, 3).label == 0


def test_folders_that_are_no_sets_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="a folder of images must exist"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold one sub-folder for each class, got none"):
        image_folder(folder / "a")
    (folder / "z").mkdir()
    with pytest.raises(DataError, match=r"class folder .*z must hold images"):
        image_folder(folder)
    with pytest.raises(DataError, match="It holds folders: are the classes those in"):
        image_folder(folder.parent)
    with pytest.raises(DataError, match="must hold images, got none"):
        ImageFiles("s", folder, [], [], None)


def test_a_damaged_file_is_refused_when_it_is_read(folder):
    (folder / "b" / "2.png").write_bytes(b"")
    images = image_folder(folder)
    with pytest.raises(UnreadableImage, match=r"b/2\.png cannot be read"):
        images.read(4, 3)


def test_a_set_goes_to_other_processes(folder):
    again = pickle.loads(pickle.dumps(image_folder(folder)))
    assert again.read(0, 3).label == 0 and again.fingerprint == image_folder(folder).fingerprint


def test_a_picture_as_it_is_stored_is_that_of_plain_pillow(tmp_path):
    """Neither turned nor laid on white: what RobustBench, timm and torchvision see."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = noise(8, 12, seed=1)
    turned.save(tmp_path / "0.png", exif=exif)
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    clear.save(tmp_path / "1.png")
    stored = ImageFiles("s", tmp_path, ["0.png", "1.png"], [0, 0], None, as_stored=True)
    upright = ImageFiles("s", tmp_path, ["0.png", "1.png"], [0, 0], None)
    for number in (0, 1):
        with Image.open(tmp_path / f"{number}.png") as file:
            expected = np.asarray(file.convert("RGB"))
        assert np.array_equal(np.asarray(stored.read(number, 3).image), expected)
        assert np.asarray(upright.read(number, 3).image).shape != expected.shape or number == 1
    assert (np.asarray(upright.read(1, 3).image) == 255).all()
