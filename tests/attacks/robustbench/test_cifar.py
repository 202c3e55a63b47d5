"""The files of CIFAR: every image in its place, and no code that a file could run."""

import os
import pickle

import cifar_files
import numpy as np
import pytest
import torch

from ironmoe.attacks.robustbench.cifar import CIFAR, cifar_test_set


def labels_of(name, count):
    return [(7 * place) % CIFAR[name].classes for place in range(count)]


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("protocol", [0, 2, 3, 4, "Python 2"])
def test_images_and_labels_come_in_the_order_of_the_file(name, protocol, tmp_path):
    data, labels = cifar_files.pixels(12), labels_of(name, 12)
    if protocol == "Python 2":
        cifar_files.write_as_python_2(tmp_path, name, data, labels)
    else:
        cifar_files.write(tmp_path, name, data, labels, protocol=protocol)

    images, classes = cifar_test_set(name, tmp_path)
    assert images.dtype == torch.float32 and classes.dtype == torch.int64
    planes = torch.from_numpy(data).view(12, 3, 32, 32)  # red, green and blue one after another
    assert torch.equal(images, planes.to(torch.float32).div(255))  # as ToTensor rounds
    assert classes.tolist() == labels

    few, classes = cifar_test_set(name, str(tmp_path), 5)
    assert torch.equal(few, images[:5]) and classes.tolist() == labels[:5]
    assert len(cifar_test_set(name, tmp_path, 100)[0]) == 12


@pytest.mark.parametrize("name", CIFAR)
def test_what_is_missing_is_named_with_what_to_download(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        cifar_test_set(name, tmp_path)
    text = str(caught.value)
    assert cifar_files.PLACES[name] in text and str(tmp_path) in text
    assert CIFAR[name].archive in text and "unpack it there" in text
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'mnist'"):
        cifar_test_set("mnist", tmp_path)


class Runs:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_file_runs_no_code(tmp_path):
    path = cifar_files.write(tmp_path, "cifar10", cifar_files.pixels(2), [0, 1])
    for entries in (Runs(tmp_path / "made"), {"data": Runs(tmp_path / "made"), "labels": [0]}):
        path.write_bytes(pickle.dumps(entries))
        with pytest.raises(ValueError, match=r"must be a file of CIFAR, .*asks for \w+\.mkdir"):
            cifar_test_set("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "made").exists()  # the plain unpickler does


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1, 2], "must hold a dict, got list"),
        ({"labels": [0]}, r"must have images \(N, 3072\) of uint8 under 'data'"),
        ({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}, r"images \(N, 3072\)"),
        ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, "of uint8"),
        ({"data": cifar_files.pixels(2), "labels": [0]}, "a list of 2 labels from 0 to 9"),
        ({"data": cifar_files.pixels(2), "labels": [0, 10]}, "labels from 0 to 9 under 'labels'"),
        ({"data": cifar_files.pixels(2), "fine_labels": [0, 1]}, "under 'labels'"),
    ],
)
def test_a_file_of_something_else_is_refused(entries, message, tmp_path):
    path = cifar_files.write(tmp_path, "cifar10", cifar_files.pixels(2), [0, 1])
    path.write_bytes(pickle.dumps(entries, protocol=2))
    with pytest.raises(ValueError, match=message):
        cifar_test_set("cifar10", tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    path = cifar_files.write(tmp_path, "cifar10", cifar_files.pixels(2), [0, 1])
    for content in (b"", b"no pickle", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be a file of CIFAR, got another"):
            cifar_test_set("cifar10", tmp_path)
