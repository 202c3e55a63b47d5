"""RobustBench's list of ImageNet's images."""

import pytest

from ironmoe.attacks.robustbench.imagenet import imagenet_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first three files of the list, empty."""
    folder = tmp_path_factory.mktemp("imagenet")
    first = {
        "n09468604": 15253,
        "n02823750": 20685,
        "n09472597": 39611,
    }
    for synset, number in first.items():
        path = folder / "val" / synset / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True)
        path.touch()
    return folder


def test_the_list_is_in_the_order_of_robustbench_with_labels_among_all_classes(folder):
    paths, labels = imagenet_images(folder, 3)
    assert [path.parent.name for path in paths] == ["n09468604", "n02823750", "n09472597"]
    assert paths[0].name == "ILSVRC2012_val_00015253.JPEG"
    assert labels == [979, 441, 980]  # valley, beer glass and volcano of the 1,000 classes


def test_images_that_are_missing_are_counted_and_the_first_is_named(folder):
    with pytest.raises(FileNotFoundError) as caught:
        imagenet_images(folder)
    text = str(caught.value)
    assert "without 4997 of 5000, first " in text and "val/n" in text
    assert "https://image-net.org" in text
    for count in (0, 5001):
        with pytest.raises(ValueError, match=f"from 1 to 5000 for imagenet, got {count}"):
            imagenet_images(folder, count)
