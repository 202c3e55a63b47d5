"""Map-style data sets of torch: whatever form their items have."""

import io
import os
from collections import UserDict

import numpy as np
import pytest
import torch
from pictures import encoded, noise
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from ironmoe.attacks.data import DataError, TorchImages, UnreadableImage

PIXELS = np.asarray(noise(4, 5))  # (H, W, 3)
FIRST = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)


class Items(Dataset):
    """The items that it is given; those that are errors are raised."""

    def __init__(self, *items, **attributes):
        self.items = items
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        item = self.items[number]
        if isinstance(item, Exception):
            raise item
        return item


def read(image, label=1, channels=3):
    return TorchImages(Items((image, label))).read(0, channels)


@pytest.mark.parametrize("image", [
    FIRST, FIRST.permute(1, 2, 0), PIXELS, PIXELS.transpose(2, 0, 1), np.asfortranarray(PIXELS),
    FIRST.permute(1, 2, 0).contiguous(), torch.nn.Parameter(FIRST.float() / 255),
    FIRST.double() / 255, PIXELS / 255, PIXELS.astype(">f4") / np.float32(255),
    FIRST.as_subclass(type("Special", (torch.Tensor,), {})),
])  # fmt: skip
def test_tensors_and_arrays_of_either_layout_give_their_pixels(image):
    found, label = read(image)
    assert found.shape == (3, 4, 5) and label == 1
    assert found.dtype == (torch.uint8 if "uint8" in str(image.dtype) else torch.float32)
    values = found if found.dtype == torch.uint8 else (found * 255).round()
    assert torch.equal(values.to(torch.uint8), FIRST)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_short_floats_become_float32(kind):
    image = (FIRST / 255).to(kind)
    assert torch.equal(read(image).image, image.float())


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_have_one_channel_or_the_same_three_times(channels):
    for image in (FIRST[0], FIRST[:1], FIRST[0].numpy(), FIRST[0, :, :, None]):
        found = read(image, channels=channels).image
        assert torch.equal(found, FIRST[:1].expand(channels, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_images_become_pictures_of_the_wanted_channels(channels):
    found = read(noise(4, 5), channels=channels).image
    assert found.mode == ("L" if channels == 1 else "RGB")
    assert channels == 1 or np.array_equal(found, PIXELS)


@pytest.mark.parametrize("label", [
    1, np.int32(1), np.array(1), np.array([1]), torch.tensor(1), torch.tensor([1]),
    torch.tensor(1, dtype=torch.uint8),
])  # fmt: skip
def test_a_label_is_one_whole_number_of_any_type(label):
    found = read(FIRST, label).label
    assert found == 1 and type(found) is int


@pytest.mark.parametrize("item", [
    {"image": FIRST, "label": 2}, {"labels": 2, "img": FIRST, "id": 9}, [FIRST, 2],
    {"pixel_values": FIRST, "labels": 2}, {"images": FIRST, "target": 2},
    UserDict(image=FIRST, label=2),
])  # fmt: skip
def test_items_are_pairs_or_mappings(item):
    found = TorchImages(Items(item)).read(0, 3)
    assert torch.equal(found.image, FIRST) and found.label == 2


@pytest.mark.parametrize(("item", "match"), [
    ((FIRST, torch.eye(3)[1]), r"one whole number, got shape \(3,\): of a one-hot label give the"),
    ((FIRST, [0, 1]), r"one whole number, got shape \(2,\)"),
    ((FIRST, 1.5), "a whole number of at least 0, got 1.5"),
    ((FIRST, torch.tensor(0.5)), "a whole number of at least 0, got 0.5"),
    ((FIRST, True), "a whole number of at least 0, got True"),
    ((FIRST, -1), "a whole number of at least 0, got -1"),
    ((FIRST, 2**63), "a whole number of at least 0 and below 2[*][*]63, got 9223372036854775808"),
    ((FIRST, "cat"), "a whole number of at least 0, got 'cat'"),
    ((FIRST, None), "a whole number of at least 0, got None"),
    ((FIRST, 1, 2), r"must be \(image, label\), or a mapping with these keys, got a tuple of 3"),
    (FIRST, "got a Tensor"),
    ({"image": FIRST}, "one key of image, .* and one of label, .*, got image"),
    ({"image": FIRST, "img": FIRST, "label": 0}, "must have one key of image"),
    (("a.png", 1), "must be a Pillow image, a tensor or an array, got str"),
    ((FIRST.long(), 1), r"must be uint8 or floats in \[0, 1\], got int64"),
    ((FIRST / 255 - 0.5, 1), "as after normalisation: leave Normalize out of its transform"),
    ((FIRST.float(), 1), "got values from .* to 248: divide by 255; or, if they were normal"),
    ((FIRST[None], 1), r"1 or 3 channels and some pixels, got \(1, 3, 4, 5\)"),
    ((torch.rand(4, 5, 5), 1), "1 or 3 channels and some pixels"),
    ((torch.rand(3, 0, 5), 1), "1 or 3 channels and some pixels"),
])  # fmt: skip
def test_items_of_another_form_are_refused_by_their_number(item, match):
    images = TorchImages(Items((FIRST, 0), item))
    with pytest.raises(DataError, match=rf"item 1 of Items.*{match}") as caught:
        images.read(1, 3)
    assert not isinstance(caught.value, UnreadableImage)  # all of them will be so


def test_colours_are_not_made_grey():
    with pytest.raises(
        DataError, match="item 0 of Items must have 1 channels for this model, got 3"
    ):
        read(FIRST, channels=1)


def test_one_image_that_is_not_finite_is_unreadable():
    with pytest.raises(UnreadableImage, match="item 0 of Items must be finite"):
        read(torch.full((3, 4, 4), float("nan")))


@pytest.mark.parametrize("error", [
    OSError("broken\nfile"), ValueError("file"), RuntimeError("png: file"), EOFError("file"),
])  # fmt: skip
def test_what_damaged_files_raise_is_told_on_one_line_with_the_number(error):
    images = TorchImages(Items((FIRST, 0), error))
    with pytest.raises(UnreadableImage) as caught:
        images.read(1, 3)
    assert str(caught.value).startswith(f"item 1 of Items cannot be read: {type(error).__name__}: ")
    assert str(caught.value).endswith("file") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("no"), IndexError("2"), ZeroDivisionError()]
)
def test_other_errors_are_those_of_the_code_and_skip_nothing(error):
    images = TorchImages(Items((FIRST, 0), error))
    with pytest.raises(
        DataError, match=rf"item 1 .* must be readable, got {type(error).__name__}"
    ) as caught:
        images.read(1, 3)
    assert not isinstance(caught.value, UnreadableImage)


def test_labels_and_names_are_known_without_reading():
    nothing = [KeyError("read")] * 4
    for attributes in ({"targets": [2, 0, 1, 1]}, {"labels": np.array([2, 0, 1, 1])},
                       {"targets": torch.tensor([2, 0, 1, 1]), "labels": "train"}):  # fmt: skip
        images = TorchImages(Items(*nothing, **attributes))
        assert images.labels.tolist() == [2, 0, 1, 1] and images.names is None
    assert TorchImages(Items(*nothing, classes=["b", "a"])).names == ["b", "a"]
    assert TorchImages(Items(*nothing, classes=[("tench", "Tinca"), "a"])).names == [
        "tench, Tinca",
        "a",
    ]
    assert TorchImages(Items(*nothing, class_to_idx={"a": 1, "b": 0})).names == ["b", "a"]


@pytest.mark.parametrize("attributes", [
    {"targets": [0, 1]}, {"targets": torch.eye(4)}, {"targets": ["a"] * 4}, {"labels": [0.5] * 4},
    {"targets": None}, {"targets": [[0], [1, 2], [3], [4]]}, {"targets": [-1, 0, 0, 0]},
    {"targets": [0, 1, 2, 3], "classes": "abcd", "target_transform": abs}, {"classes": []},
])  # fmt: skip
def test_attributes_that_mean_something_else_are_passed_over(attributes):
    images = TorchImages(Items(*[(FIRST, 0)] * 4, **attributes))
    assert images.labels is None and images.names is None
    assert images.read(3, 3).label == 0


def test_parts_of_a_data_set_know_their_labels_and_names():
    whole = Items(*[(FIRST, n) for n in range(4)], targets=[0, 1, 2, 3], classes=list("abcd"))
    part = Subset(Subset(whole, [3, 1, 2]), [0, 2])
    images = TorchImages(part)
    assert images.labels.tolist() == [3, 2] and images.names == list("abcd")
    assert [images.read(n, 3).label for n in (0, 1)] == [3, 2]
    both = TorchImages(ConcatDataset([part, whole]))
    assert both.labels.tolist() == [3, 2, 0, 1, 2, 3] and both.names == list("abcd")
    unknown = TorchImages(ConcatDataset([part, Items((FIRST, 0), classes=list("abcd"))]))
    assert unknown.labels is None and unknown.names == list("abcd")
    assert TorchImages(ConcatDataset([Items((FIRST, 0))] * 2)).names is None
    tensors = TorchImages(TensorDataset(FIRST.expand(5, -1, -1, -1), torch.arange(5)))
    assert tensors.labels.tolist() == [0, 1, 2, 3, 4] and tensors.read(3, 3).label == 3


@pytest.mark.parametrize(("other", "told"), [
    ({"classes": ["b", "a"]}, "'a' and 'b' for label 0"),
    ({"classes": ["a"]}, "'b' and no name for label 1"),
    ({"classes": ["a", "b", "c"]}, "no name and 'c' for label 2"),
    ({}, "'a' and no name for label 0"),
    ({"classes": ["a", "b"], "target_transform": abs}, "'a' and no name for label 0"),
])  # fmt: skip
def test_parts_in_which_a_label_means_different_classes_are_refused(other, told):
    items = [(FIRST, 0), (FIRST, 1)]
    both = ConcatDataset([Items(*items, classes=["a", "b"]), Subset(Items(*items, **other), [0])])
    with pytest.raises(DataError, match=f"the same classes in the same order, .* got {told}"):
        TorchImages(Subset(both, [0, 2]))


@pytest.mark.parametrize("make", [
    lambda file: file, lambda file: file.convert("RGB"), lambda file: file.rotate(-90, expand=True),
])  # fmt: skip
def test_a_pillow_image_is_as_the_data_set_made_it_and_not_as_its_file_was(make):
    """Pillow keeps beside the pixels how the file lay, and which of its colours was transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture = noise(4, 5)
    held = encoded(picture, "PNG", exif=exif, transparency=tuple(PIXELS[0, 0].tolist()))
    images = TorchImages(Items((make(Image.open(io.BytesIO(held))), 1)))
    for _ in range(2):
        assert np.array_equal(images.read(0, 3).image, np.asarray(make(picture)))
    assert np.array_equal(images.read(0, 1).image, np.asarray(make(picture).convert("L")))


def test_a_pillow_image_with_an_alpha_of_its_own_lies_on_white():
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert (np.asarray(read(clear).image) == 255).all()


def test_an_address_in_memory_is_no_part_of_an_error():
    error = OSError(f"cannot identify image file {io.BytesIO()!r} by {object()!r}")
    with pytest.raises(UnreadableImage, match=r"image file by <object object>$"):
        TorchImages(Items(error)).read(0, 3)


def test_labels_that_are_others_than_those_that_are_named_are_refused():
    with pytest.raises(DataError, match=r"got 0 of item 1 of Items in place of 2"):
        TorchImages(Items((FIRST, 0), (FIRST, 0), targets=[0, 2])).read(1, 3)
    with pytest.raises(DataError, match="below the number of classes, 2, got 2 of item 0 of Items"):
        TorchImages(Items((FIRST, 2), classes=["a", "b"])).read(0, 3)


class Noisy(Dataset):
    def __init__(self, of):
        self.of = of

    def __len__(self):
        return 10

    def __getitem__(self, number):
        noise = torch.rand(3, 2, 2)
        return (noise, 0) if self.of == "images" else (FIRST, int(1e6 * noise[0, 0, 0]))


@pytest.mark.parametrize("of", ["images", "labels"])
def test_items_that_are_others_each_time_are_refused(of):
    with pytest.raises(
        DataError, match=r"item 3 of Noisy must be the same each time .* random transf"
    ):
        TorchImages(Noisy(of)).read(3, 3)


def test_each_process_looks_twice_at_its_first_images(monkeypatch):
    asked = []

    class Asked(Items):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    images = TorchImages(Asked(*[(FIRST, 0)] * 9))
    for number in range(6):
        images.read(number, 3)
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    images.read(6, 3)
    assert asked[10:] == [6, 6]


def test_the_fingerprint_tells_what_is_known_without_reading(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12")
    (tmp_path / "b.png").write_bytes(b"123")
    data = np.zeros((2, 4, 4, 3), np.uint8)
    items = [KeyError("read")] * 2
    sets = [
        Items(*items), Items(*items, targets=[0, 1]), Items(*items, targets=[1, 0]),
        Items(*items, classes=["a", "b"]), Items(*items, items[0]),
        Items(*items, data=data), Items(*items, data=data + 1), Subset(Items(*items), [0, 1]),
        Items(*items, samples=[(str(tmp_path / "a.png"), 0)]),
        Items(*items, samples=[(str(tmp_path / "b.png"), 0)]),
        Items(*items, transform="Resize(3)"), Items(*items, transform="Resize(4)"),
        TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2).long()),
        TensorDataset(torch.ones(2, 3, 4, 4), torch.zeros(2).long()),
    ]  # fmt: skip
    prints = [TorchImages(each, name="x").fingerprint for each in sets]
    assert len(set(prints)) == len(sets)
    assert prints == [TorchImages(each, name="x").fingerprint for each in sets]


def test_an_address_in_memory_is_no_part_of_the_fingerprint():
    prints = {TorchImages(Items((FIRST, 0), transform=object())).fingerprint for _ in range(2)}
    assert len(prints) == 1


def test_data_sets_without_numbers_or_items_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    for given in (Endless(), iter([]), {1, 2}):
        with pytest.raises(
            DataError, match=r"a length and items by number.*give a DataLoader of it"
        ):
            TorchImages(given)
    with pytest.raises(DataError, match="Items must hold images, got none"):
        TorchImages(Items())
