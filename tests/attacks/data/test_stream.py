"""The stream: the same bytes whatever the workers, few of them at a time, errors by their place."""

import gc
import os
import time
import weakref

import numpy as np
import pytest
import torch
from pictures import Joined, Numbers, encoded, noise, started_by
from torch import multiprocessing

from ironmoe.attacks.data import (
    DataError,
    ImageStream,
    Item,
    Preprocessing,
    TorchImages,
    UnreadableImage,
    image_arrays,
    image_folder,
    labelled_files,
    parquet_images,
    saved_dataset,
)
from ironmoe.attacks.data.stream import READ_TOGETHER

GREY = Preprocessing(channels=1)
SMALL = Preprocessing(resize=(9, 9), crop=(8, 8))


def all_of(stream, places=None):
    places = torch.arange(len(stream)) if places is None else places
    batches = list(stream.read(places))
    return [torch.cat([batch[part] for batch in batches]) for part in range(4)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One image set of each form, of pictures of all sizes and modes, joined to one."""
    root = tmp_path_factory.mktemp("sets")
    (root / "folder" / "a").mkdir(parents=True)
    (root / "folder" / "b").mkdir()
    for number in range(20):
        channels = 1 if number % 3 == 0 else 3
        picture = noise(8 + number, 30 - number, channels, seed=number)
        picture.save(root / "folder" / "ab"[number % 2] / f"{number}.jpg")
        picture.save(root / f"{number}.png")
    (root / "labels.csv").write_text("".join(f"{n}.png,{n % 4}\n" for n in range(20)))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 9, 3), np.uint8)
    np.savez(root / "x.npz", images=images, labels=np.arange(20))
    found = [image_folder(root / "folder"), labelled_files(root), image_arrays(root / "x.npz"),
             TorchImages([(noise(9, 9, seed=n), n) for n in range(20)])]  # fmt: skip

    held = [{"bytes": encoded(noise(9, 12, seed=n), "PNG"), "path": None} for n in range(20)]
    try:
        import datasets
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return Joined(found)
    table = pa.table({"image": held, "label": [n % 2 for n in range(20)]})
    parquet.write_table(table, root / "x.parquet", row_group_size=7)
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    given = {"image": held, "label": list(range(20))}
    datasets.Dataset.from_dict(given, datasets.Features(features)).save_to_disk(root / "hf")
    return Joined([*found, parquet_images(root / "x.parquet"), saved_dataset(root / "hf")])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("method", "workers"), [("fork", 1), ("fork", 3), ("spawn", 1)])
def test_the_same_bytes_come_whatever_the_workers(sets, method, workers):
    wanted = all_of(ImageStream(sets, SMALL, workers=0))
    with started_by(method):
        found = all_of(ImageStream(sets, SMALL, workers=workers))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert wanted[1].dtype == torch.uint8 and wanted[1].shape == (len(sets), 3, 8, 8)
    assert torch.equal(wanted[2], sets.labels) and wanted[3].all()


def test_pixels_are_those_of_each_picture_alone(sets):
    stream = ImageStream(sets, SMALL, workers=0)
    places, images, labels, _ = all_of(stream)
    for place in range(len(sets)):
        image, label = sets.read(place, 3)
        if isinstance(image, torch.Tensor):
            assert labels[place] == label
            continue
        assert torch.equal(images[place], SMALL(image)) and labels[place] == label
    assert torch.equal(places, torch.arange(len(sets)))


@pytest.mark.parametrize("workers", [0, 2])
def test_places_are_read_in_the_order_in_which_they_are_asked_for(workers):
    numbers = Numbers(200)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:100]
    stream = ImageStream(numbers, GREY, rows=rows, workers=workers)
    places = torch.tensor([70, 3, 3, 99, 0])
    found, images, labels, readable = all_of(stream, places)
    assert torch.equal(found, places) and readable.all()
    assert torch.equal(images[:, 0, 0, 0].long(), rows[places])
    assert torch.equal(labels, rows[places] % 3)
    assert stream.where(3) == f"number {int(rows[3])}"
    (one,) = stream.read(torch.tensor([70]))
    assert one.pixels()[0, 0, 0, 0] == rows[70] / 255


def test_two_shares_read_exactly_their_images():
    numbers = Numbers(100)
    mine, others = torch.arange(100)[::2], torch.arange(100)[1::2]
    for share in (mine, others):
        numbers.asked.clear()
        _, images, _, _ = all_of(ImageStream(numbers, GREY, workers=0), share)
        assert numbers.asked == share.tolist() == images[:, 0, 0, 0].tolist()


def test_a_loop_gives_pixels_of_readable_images_alone():
    stream = ImageStream(Numbers(70, bad=[0, 33, *range(64, 70)]), GREY, workers=0, skip_bad=True)
    images, labels = map(torch.cat, zip(*stream, strict=True))
    good = torch.tensor([n for n in range(64) if n not in (0, 33)])
    assert images.dtype == torch.float32 and torch.equal(images[:, 0, 0, 0], good / 255)
    assert torch.equal(labels, good % 3)
    assert sorted(stream.unread) == [0, 33, *range(64, 70)]
    assert stream.unread[33] == "number 33 is damaged"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [[5], list(range(32)), [5, 70]])
def test_images_that_cannot_be_read_are_black_and_keep_their_places(workers, bad):
    pipeline = GREY.with_(resize=(4, 4), mode="exact")
    stream = ImageStream(Numbers(80, bad), pipeline, workers=workers, skip_bad=True)
    places, images, labels, readable = all_of(stream)
    assert (~readable).nonzero().flatten().tolist() == bad == sorted(stream.unread)
    assert not images[bad].any() and torch.equal(labels, places % 3)  # the set knows them
    assert torch.equal(images[readable][:, 0, 0, 0].long(), places[readable])


class Untold(Numbers):
    """Labels are known when an image is read: all are 7."""

    labels = None

    def __init__(self, count, bad):
        self.count = count
        self.bad = bad

    def read(self, number, channels):
        if number in self.bad:
            raise UnreadableImage(f"number {number} is damaged")
        return Item(torch.zeros(1, 4, 4, dtype=torch.uint8), 7)


def test_labels_that_could_not_be_read_are_0():
    stream = ImageStream(Untold(9, bad=[5]), GREY, workers=0, skip_bad=True)
    assert all_of(stream)[2].tolist() == [7] * 5 + [0] + [7] * 3


def test_a_part_of_a_stream_is_a_stream_and_finishes_what_it_finishes():
    stream = ImageStream(
        Numbers(90), GREY, rows=torch.arange(80, 0, -1), workers=0, finish=lambda x: x / 2
    )
    places = torch.tensor([3, 0, 70])
    whole, part = all_of(stream), all_of(stream.part(places, finish=lambda x: x + 0.25))
    assert torch.equal(whole[1][places] + 0.25, part[1]) and torch.equal(whole[2][places], part[2])
    assert len(stream.part(places)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_image_ends_a_stream_that_skips_none(workers):
    stream = ImageStream(Numbers(80, bad=[40]), GREY, workers=workers)
    batches = stream.read(torch.arange(80))
    assert len(next(batches).labels) == READ_TOGETHER
    with pytest.raises(UnreadableImage, match=r"^number 40 is damaged$"):
        next(batches)


def test_a_size_that_nobody_knows_is_asked_of_the_first_images():
    stream = ImageStream(Numbers(40, bad=range(32)), GREY, workers=0, skip_bad=True)
    with pytest.raises(
        UnreadableImage, match=r"to tell their size, got 32 .*the first: number 0 is"
    ):
        list(stream.read(torch.arange(40)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("odd", [3, 31, 32, 79])
def test_images_of_other_sizes_are_refused_by_their_names(workers, odd):
    stream = ImageStream(Numbers(80, odd=[odd]), GREY, workers=workers)
    match = (
        rf"^images must have one size, got \(1, 4, 4\) uint8 of number 0 and \(1, 5, 5\) uint8 of "
        rf"number {odd}; give a resize and a crop$"
    )
    with pytest.raises(DataError, match=match):
        all_of(stream)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("logits", [[4, 0], [4, 0, -1]])
def test_labels_that_are_no_logits_are_refused_by_their_names(workers, logits):
    stream = ImageStream(Numbers(80), GREY, logits=torch.tensor(logits), workers=workers)
    match = r"^labels must be classes of the model, got 2 of number 2$"
    with pytest.raises(DataError, match=match):
        all_of(stream)


def test_labels_become_the_logits_of_the_model():
    stream = ImageStream(Numbers(9), GREY, logits=torch.tensor([7, 0, 3]), workers=0)
    assert all_of(stream)[2].tolist() == [7, 0, 3] * 3


class Wrong(Numbers):
    """A set whose images are no images of this model, or whose code is wrong."""

    def read(self, number, channels):
        if number == 50:
            raise DataError("number 50 has 4 channels")
        return super().read(number, channels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_an_error_of_a_worker_is_that_of_this_process_in_the_same_words(workers, skip_bad):
    stream = ImageStream(Wrong(80, bad=[45]), GREY, workers=workers, skip_bad=skip_bad)
    with pytest.raises(DataError, match=r"^number 50 has 4 channels$"):
        all_of(stream)


def test_arrays_are_resized_if_they_are_bytes_and_floats_of_another_size_are_refused():
    pipeline = Preprocessing(channels=1, resize=(2, 2), mode="exact", interpolation="nearest")
    images = all_of(ImageStream(Numbers(5), pipeline, workers=0))[1]
    assert images[:, 0].flatten(1).tolist() == [[n] * 4 for n in range(5)]
    shortest = Preprocessing(channels=1, resize=(2, 2), interpolation="nearest")  # of any size
    images = all_of(ImageStream(Numbers(5), shortest, workers=0))[1]
    assert images.shape == (5, 1, 2, 2)

    for side, rules in ((4, GREY), (2, pipeline)):
        floats = torch.rand(1, side, side)
        images = all_of(ImageStream(TorchImages([(floats, 0)]), rules, workers=0))[1]
        assert torch.equal(images[0], floats)
    stream = ImageStream(TorchImages([(torch.rand(1, 4, 4), 0)]), pipeline, workers=0)
    with pytest.raises(DataError, match=r"item 0 .* since floats are not resized, got 4 × 4"):
        list(stream)


def test_bytes_become_pixels_by_255_and_floats_stay():
    floats = TorchImages([(torch.full((1, 4, 4), 0.25), 0)])
    (batch,) = ImageStream(floats, GREY, workers=0).read(torch.arange(1))
    assert batch.pixels().dtype == torch.float32 and (batch.pixels() == 0.25).all()
    batch = next(ImageStream(Numbers(256), GREY, workers=0).read(torch.arange(255, 256)))
    assert batch.images.dtype == torch.uint8 and (batch.pixels("cpu") == 1).all()


def test_what_becomes_of_pixels_in_the_end_is_done_to_each_batch():
    stream = ImageStream(Numbers(40), GREY, workers=0, finish=lambda pixels: pixels.round())
    assert torch.equal(all_of(stream)[1], torch.zeros(40, 1, 4, 4))


class Counting(Numbers):
    """Counts in shared memory how many images all workers have read."""

    def __init__(self, count):
        super().__init__(count)
        self.read_so_far = multiprocessing.get_context("fork").Value("i", 0)

    def read(self, number, channels):
        with self.read_so_far.get_lock():
            self.read_so_far.value += 1
        return super().read(number, channels)


@pytest.mark.parametrize(("workers", "ahead", "batches"), [(1, 0, 2), (2, 0, 4), (2, 300, 10)])
def test_workers_are_a_few_batches_ahead_and_wait_there(workers, ahead, batches):
    numbers = Counting(100 * READ_TOGETHER)
    with started_by("fork"):
        reading = ImageStream(numbers, GREY, workers=workers).read(
            torch.arange(len(numbers)), ahead=ahead
        )
        for taken in (1, 2):
            next(reading)
            most = (taken + batches) * READ_TOGETHER
            until = time.monotonic() + 30
            while numbers.read_so_far.value < most and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.05)  # for one that would not wait
            assert numbers.read_so_far.value == most
    assert batches * READ_TOGETHER >= ahead


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_were_taken_are_not_kept(workers):
    known = []
    for batch in ImageStream(Numbers(20 * READ_TOGETHER), GREY, workers=workers).read(
        torch.arange(640)
    ):
        known.append(weakref.ref(batch.images))
        del batch
        assert sum(images() is not None for images in known) <= 1
    assert len(known) == 20


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_images_that_wait_take_few_files():
    """A tensor that comes from a worker takes one open file, of which a process may have 1,024."""
    numbers = Counting(2000)
    with started_by("fork"):
        before = len(os.listdir("/proc/self/fd"))
        reading = ImageStream(numbers, GREY, workers=1).read(torch.arange(2000), ahead=2000)
        most = 0
        for _ in reading:
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert most < 2000 / READ_TOGETHER + 40


def test_a_stream_that_is_left_early_leaves_no_process():
    stream = ImageStream(Numbers(2000), GREY, workers=2)
    before = len(multiprocessing.active_children())
    reading = stream.read(torch.arange(2000))
    next(reading)
    assert len(multiprocessing.active_children()) == before + 2
    reading.close()
    gc.collect()
    assert len(multiprocessing.active_children()) == before


def test_reading_takes_no_random_numbers_from_others():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    all_of(ImageStream(Numbers(40), GREY, workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_choice_gives_nothing():
    stream = ImageStream(Numbers(5), GREY, rows=torch.arange(0))
    assert len(stream) == 0 and list(stream) == []


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(DataError, match="workers must be at least 0, got -1"):
        ImageStream(Numbers(5), GREY, workers=-1)
