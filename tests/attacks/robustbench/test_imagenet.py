"""RobustBench's list of ImageNet's images."""

import pytest

from ironmoe.attacks.data.imagenet import imagenet_classes
from ironmoe.attacks.robustbench.imagenet import imagenet_images

FIRST = [
    ("n09468604", "ILSVRC2012_val_00015253.JPEG"),
    ("n02823750", "ILSVRC2012_val_00020685.JPEG"),
    ("n09472597", "ILSVRC2012_val_00039611.JPEG"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first three files of the list, empty."""
    folder = tmp_path_factory.mktemp("imagenet")
    for synset, file in FIRST:
        path = folder / "val" / synset / file
        path.parent.mkdir(parents=True)
        path.touch()
    return folder


def test_the_list_is_in_the_order_of_robustbench_with_labels_among_all_classes(folder):
    images = imagenet_images(folder, 3)
    assert images.files == [f"val/{synset}/{file}" for synset, file in FIRST]
    assert images.labels.tolist() == [979, 441, 980]  # valley, beer glass, volcano of the 1,000
    assert images.names == [each.wnid for each in imagenet_classes()]


@pytest.mark.parametrize("layout", ["{synset}/{file}", "{file}"])
def test_the_images_may_lie_in_folders_of_classes_or_as_their_archive_has_them(tmp_path, layout):
    files = [layout.format(synset=synset, file=file) for synset, file in FIRST]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert imagenet_images(tmp_path, 3).files == files


def test_images_that_are_missing_are_counted_and_the_first_is_named(folder):
    with pytest.raises(FileNotFoundError) as caught:
        imagenet_images(folder)
    text = str(caught.value)
    assert "without 4997 of 5000, first " in text and "val/n" in text
    assert "https://image-net.org" in text
    for count in (0, 5001):
        with pytest.raises(ValueError, match=f"from 1 to 5000 for imagenet, got {count}"):
            imagenet_images(folder, count)
