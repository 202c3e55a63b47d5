"""Batches of a user's loader: their form, their order, and whatever else a function may give."""

import numpy as np
import pytest
import torch
from pictures import Numbers, noise
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.data import (
    DataError,
    ImageArrays,
    ImageStream,
    LoaderStream,
    Preprocessing,
    TorchImages,
    images_of,
)

IMAGES = torch.arange(10 * 3 * 2 * 4, dtype=torch.uint8).view(10, 3, 2, 4)
LABELS = torch.arange(10) % 4
PAIRS = TensorDataset(IMAGES, LABELS)
LAST = IMAGES.permute(0, 2, 3, 1)


class Failing(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, number):
        if number == 5:
            raise KeyError("five")
        return IMAGES[number], 0


class Stream(IterableDataset):
    """(image, label) one by one."""

    def __iter__(self):
        return iter([(image / 255, int(label)) for image, label in PAIRS])


def all_of(stream):
    images, labels = zip(*stream, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("batches", [
    DataLoader(PAIRS, batch_size=4), DataLoader(PAIRS, batch_size=3, num_workers=1),
    DataLoader(TensorDataset(IMAGES / 255, LABELS.int()), batch_size=4),
    DataLoader(TensorDataset(IMAGES.double() / 255, LABELS[:, None]), batch_size=10),
    DataLoader(Stream(), batch_size=4), Stream(),
    DataLoader(PAIRS, batch_sampler=[[0, 1], [2, 3, 4, 5, 6, 7, 8], [9]]),
    [(IMAGES[:4], LABELS[:4]), (LAST[4:], LABELS[4:])],
    [{"pixel_values": IMAGES, "labels": LABELS}], [[IMAGES.numpy(), LABELS.tolist()]],
    [(LAST.numpy() / 255, LABELS.numpy())],
    [(IMAGES.numpy()[::-1][::-1].astype(">f8") / 255, LABELS.numpy()[::-1][::-1].astype(">i4"))],
])  # fmt: skip
def test_every_form_of_batches_gives_float32_pixels_and_whole_numbers(batches):
    stream = LoaderStream(batches)
    for _ in range(2):  # it can be gone through again
        images, labels = all_of(stream)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert torch.equal((images * 255).round().to(torch.uint8), IMAGES)
        assert images.min() >= 0 and images.max() <= 1
        assert torch.equal(labels, LABELS)


def test_grey_images_are_repeated_where_the_model_wants_colours():
    grey = [(IMAGES[:, 0], LABELS)]
    assert all_of(LoaderStream(grey))[0].shape == (10, 1, 2, 4)
    images = all_of(LoaderStream(grey, channels=3))[0]
    assert images.shape == (10, 3, 2, 4) and torch.equal(images[:, 0], images[:, 2])
    with pytest.raises(DataError, match="must have 1 channels for this model, got 3"):
        list(LoaderStream([(IMAGES, LABELS)], channels=1))


@pytest.mark.parametrize(("batches", "length", "notes"), [
    (DataLoader(PAIRS, batch_size=4), 10, []),
    (DataLoader(PAIRS, batch_size=4, drop_last=True), 8,
     ["2 images are left out, because the loader has drop_last=True."]),
    (DataLoader(PAIRS, batch_size=5, drop_last=True), 10, []),
    (DataLoader(PAIRS, batch_size=4, sampler=[5, 1, 2]), 3, []),
    (DataLoader(PAIRS, batch_sampler=[[0, 1], [2]]), None, []),
    (DataLoader(Stream(), batch_size=4), None, []), (Stream(), None, []), ([], None, []),
])  # fmt: skip
def test_the_number_of_images_is_known_where_the_loader_says_so(batches, length, notes):
    stream = LoaderStream(batches)
    assert stream.length == length and stream.notes == notes
    assert LoaderStream(batches, length=77).length == 77
    if length is not None:
        assert sum(len(labels) for _, labels in stream) == length


@pytest.mark.parametrize("sampler", [
    RandomSampler(PAIRS), SubsetRandomSampler(range(10)), WeightedRandomSampler([1] * 10, 10),
    RandomSampler(PAIRS, generator=torch.Generator().manual_seed(0)),
])  # fmt: skip
def test_a_loader_that_shuffles_is_refused(sampler):
    match = rf"in the same order each time, got a {type(sampler).__name__}: .* shuffle=False"
    with pytest.raises(DataError, match=match):
        LoaderStream(DataLoader(PAIRS, sampler=sampler))
    with pytest.raises(DataError, match=match):
        LoaderStream(DataLoader(PAIRS, batch_sampler=BatchSampler(sampler, 4, False)))


def test_shuffle_is_refused_and_an_order_by_hand_is_not():
    with pytest.raises(DataError, match="RandomSampler"):
        LoaderStream(DataLoader(PAIRS, shuffle=True))
    batches = BatchSampler(SequentialSampler(PAIRS), 4, False)
    assert LoaderStream(DataLoader(PAIRS, batch_sampler=batches)).length == 10


def test_a_loader_that_shares_its_images_out_is_refused():
    sampler = DistributedSampler(PAIRS, num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(
        DataError, match="got a DistributedSampler: evaluate shares them out itself"
    ):
        LoaderStream(DataLoader(PAIRS, sampler=sampler))


@pytest.mark.parametrize(("batch", "match"), [
    ((IMAGES, LABELS, LABELS), r"must be \(image, label\).*got a tuple of 3"),
    ((IMAGES, LABELS[:9]), r"with n labels, got shapes \(10, 3, 2, 4\) and \(9,\)"),
    ((IMAGES[:, :2], LABELS), "must be images"),
    ((IMAGES[0], LABELS), "must be images"),
    ((IMAGES[0], 3), r"one whole number for each image, got shape \(\).*of single images batches"),
    ((IMAGES, torch.eye(10)), r"got shape \(10, 10\): of one-hot labels give the place of the 1"),
    ((IMAGES, LABELS.float()), "whole numbers of at least 0, got float32"),
    ((IMAGES, LABELS - 1), "whole numbers of at least 0, got -1"),
    ((IMAGES, np.full(10, 2**63, np.uint64)), "must be below 2[*][*]63, got 9223372036854775808"),
    ((IMAGES, ["a"] * 10), "whole numbers of at least 0, got <U1"),
    ((IMAGES / 255 - 0.5, LABELS), "as after normalisation: leave Normalize out"),
    ((IMAGES.float(), LABELS), "divide by 255"),
    ((IMAGES / 0.0, LABELS), "must be finite"),
    (([noise(2, 2)] * 2, [0, 1]), "must be a Pillow image, a tensor or an array, got list"),
    ({"image": IMAGES}, "must have one key of"),
    (IMAGES, "got a Tensor"),
])  # fmt: skip
def test_batches_of_another_form_are_refused_by_their_number(batch, match):
    batches = iter(LoaderStream([(IMAGES, LABELS), batch], name="mine"))
    next(batches)
    with pytest.raises(DataError, match=rf"batch 1 of mine.*{match}"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_loader_is_told_on_one_line(workers):
    loader = DataLoader(Failing(), batch_size=2, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(LoaderStream(loader))
    assert str(caught.value) == "batch 2 of loader cannot be read: KeyError: 'five'"


def test_an_iterator_is_gone_through_once():
    stream = LoaderStream(iter([(IMAGES, LABELS)]))
    assert torch.equal(all_of(stream)[1], LABELS)
    with pytest.raises(
        DataError, match="an iterator that can be gone through once: give what makes"
    ):
        list(stream)


class Blob:
    pass


@pytest.mark.parametrize(("given", "wanted", "name"), [
    (PAIRS, TorchImages, "TensorDataset"), ((IMAGES, LABELS), TorchImages, "tuple"),
    ([(image, label) for image, label in PAIRS], TorchImages, "list"),
    (DataLoader(PAIRS), LoaderStream, "DataLoader"), (Stream(), LoaderStream, "Stream"),
    (iter([(IMAGES, LABELS)]), LoaderStream, "list_iterator"),
    ((IMAGES.numpy(), LABELS.numpy()), ImageArrays, "tuple"),
    ((IMAGES, LABELS.tolist()), ImageArrays, "tuple"),
    ([LAST.numpy() / 255, ["cat"] * 10], ImageArrays, "list"),
    ([(IMAGES, LABELS)], LoaderStream, "list"), (((IMAGES, LABELS),), LoaderStream, "tuple"),
    ([{"image": IMAGES.numpy(), "label": LABELS}] * 2, LoaderStream, "list"),
])  # fmt: skip
def test_whatever_a_function_gives_becomes_a_set_or_a_stream(given, wanted, name):
    found = images_of(given)
    assert type(found) is wanted and found.name == name
    assert images_of(given, name="mine").name == "mine"


def test_images_and_labels_as_arrays_are_a_set_of_them():
    found = images_of((LAST.numpy() / 255, LABELS.numpy()))
    image, label = found.read(7, 3)
    assert torch.equal((image * 255).round().to(torch.uint8), IMAGES[7]) and label == 3
    prints = [images_of(pair).fingerprint for pair in (
        (IMAGES.numpy(), LABELS), (IMAGES.numpy(), LABELS), (IMAGES.numpy(), LABELS + 1),
        (IMAGES.numpy() + 1, LABELS), (IMAGES.bfloat16() / 256, LABELS.numpy()),
    )]  # fmt: skip
    assert prints[0] == prints[1] and len(set(prints)) == 4
    for labels, match in ((np.eye(10), "one axis of whole"), ([[1], [1, 2]], "arrays of images"),
                          (LABELS[:9].numpy(), "as many images as labels")):  # fmt: skip
        with pytest.raises(DataError, match=f"mine must .*{match}|in mine must be {match}"):
            images_of((IMAGES.numpy(), labels), name="mine")


def test_a_list_of_batches_gives_its_images():
    images, labels = all_of(images_of([(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]))
    assert torch.equal((images * 255).round().to(torch.uint8), IMAGES)
    assert torch.equal(labels, LABELS)


def test_sets_and_streams_are_taken_as_they_are():
    numbers = Numbers(3)
    for given in (numbers, ImageStream(numbers, Preprocessing(channels=1)), LoaderStream([])):
        assert images_of(given) is given


def test_data_sets_of_hugging_face_are_read_by_their_columns():
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])}
    given = datasets.Dataset.from_dict({"image": [noise(4, 5)], "label": [1]},
                                       datasets.Features(features))  # fmt: skip
    found = images_of(given, name="mine")
    assert found.names == ["b", "a"] and found.labels.tolist() == [1] and found.name == "mine"
    assert np.array_equal(found.read(0, 3).image, noise(4, 5))
    for several in (datasets.DatasetDict({"train": given}), given.to_iterable_dataset()):
        with pytest.raises(DataError, match=r"must be one datasets\.Dataset, as a split of it"):
            images_of(several)


@pytest.mark.parametrize("given", [None, 3, "text", {"a": 1}, Blob()])
def test_what_is_nothing_of_these_is_refused(given):
    with pytest.raises(DataError, match=f"data must be a data set .*, got {type(given).__name__}"):
        images_of(given)


@pytest.mark.parametrize("batch", [3, 10])
def test_evaluate_takes_a_loader_as_it_takes_the_tensors(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 4))
    attacks = {"pgd": PGD(model, 0.05, steps=3)}
    loader = LoaderStream(DataLoader(PAIRS, batch_size=batch))
    report = evaluate(model, loader, attacks, checks=False)
    wanted = evaluate(model, (IMAGES / 255, LABELS), attacks, checks=False)
    assert torch.equal(report.attacks["pgd"].fell, wanted.attacks["pgd"].fell)
    assert torch.equal(report.clean_correct, wanted.clean_correct)


def test_images_that_a_budget_does_not_reach_are_counted_where_the_length_is_known():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 4))
    options = {"checks": False, "batch_size": 2, "max_forwards": 5}
    attacks = {"pgd": PGD(model, 0.05, steps=3)}
    report = evaluate(model, LoaderStream(DataLoader(PAIRS, batch_size=2)), attacks, **options)
    assert report.unread > 0 and report.unread + len(report.clean_correct) == 10


def test_a_length_that_is_wrong_ends_as_the_one_that_was_read():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 4))
    stream = LoaderStream(Stream(), length=1000)
    report = evaluate(model, stream, {"pgd": PGD(model, 0.05, steps=1)}, checks=False)
    assert report.unread == 0 and len(report.clean_correct) == 10
