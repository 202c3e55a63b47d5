"""Votes depend on the seed, the image and the copy alone: not on batches, order, interruptions or
processes."""

import itertools
import json
from dataclasses import astuple

import pytest
import torch
import toys
from two_processes import run_in_two_processes

from ironmoe.attacks import JournalError
from ironmoe.attacks.certificates import attack_curve, certify, journal, predict
from ironmoe.attacks.certificates.noise import Draw, copy_keys

OPTIONS = {"sigma": 0.3, "selection": 20, "samples": 150}


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(24)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


@pytest.fixture(scope="module")
def whole(model, data):
    return certify(model, data, **OPTIONS).certificates


class Killed(Exception):
    pass


def kill_after(passes, model):
    """The model, which dies at a call after so many passes of single copies."""
    left = [passes]

    def dying(x):
        left[0] -= len(x)
        if left[0] < 0:
            raise Killed
        return model(x)

    return dying


def lines(folder):
    return [json.loads(line) for line in (folder / "certificates-0.jsonl").open()]


@pytest.mark.parametrize(("batch_size", "images"), [(1, 2), (7, 8), (170, 24), (1000, 24)])
def test_batches_change_nothing(model, data, whole, batch_size, images):
    few = slice(0, images)
    part = tuple(column[few] for column in data)
    found = certify(model, part, batch_size=batch_size, **OPTIONS).certificates
    assert found == whole[few]
    assert len({each.count for each in found}) > 1  # not all alike


def test_streams_and_limits_change_nothing(model, data, whole):
    read = []

    def stream():
        for first in range(0, 24, 5):
            read.append(first)
            yield tuple(column[first : first + 5] for column in data)

    assert certify(model, stream(), **OPTIONS).certificates == whole
    read.clear()
    assert certify(model, stream(), limit=7, **OPTIONS).certificates == whole[:7]
    assert read == [0, 5]  # and no batch that is not needed
    assert certify(model, data, limit=7, **OPTIONS).certificates == whole[:7]
    assert certify(model, data, limit=100, **OPTIONS).certificates == whole


def test_the_length_of_one_draw_changes_nothing_in_the_other(model, data, whole):
    more = certify(model, data, **OPTIONS | {"selection": 31}).certificates
    assert [(each.count, each.choice) for each in more] == [
        (each.count, each.choice) for each in whole
    ]
    other = certify(model, data, seed=1, **OPTIONS).certificates
    assert [each.count for each in other] != [each.count for each in whole]


def test_seeds_are_independent_of_each_other():
    """On equal images the votes under one seed are not those under its neighbour, moved by one
    image."""
    images = torch.full((60, 4), 0.55, dtype=torch.float64)
    data = images, torch.zeros(60, dtype=torch.int64)

    def model(x):
        return torch.stack([x[:, 0] - 0.5, 0.5 - x[:, 0]], 1)

    counts = [
        [each.count for each in certify(model, data, seed=seed, **OPTIONS).certificates]
        for seed in range(3)
    ]
    shifts = range(-3, 4)
    for seed, shift in itertools.product((1, 2), shifts):
        pairs = itertools.product(range(60), repeat=2)
        same = [counts[seed][i] == counts[seed - 1][j] for i, j in pairs if j == i + shift]
        assert sum(same) < len(same) / 2


def test_no_two_copies_have_the_same_key():
    """Of any seed, image and draw; seeds may be large, and below 0."""
    seeds = [*range(-4, 8), 1 << 62, (1 << 64) + 9, 100 - (1 << 70)]
    numbers = torch.arange(40).repeat_interleave(20)
    copies = torch.arange(20).repeat(40)
    keys = [copy_keys(seed, numbers, draw, copies) for seed in seeds for draw in Draw]
    together = torch.cat(keys)
    assert len(together.unique()) == len(together)


def test_predictions_depend_on_the_numbers_of_images_and_not_on_their_places(model, data):
    images, _ = data
    options = {"sigma": 1.5, "samples": 40, "alpha": 0.01}
    classes = predict(model, images, **options)
    order = torch.arange(23, -1, -1)
    turned = predict(model, images[order], indices=order, batch_size=64, **options)
    assert torch.equal(turned[order], classes)
    assert (classes == -1).any() and (classes >= 0).any()
    elsewhere = predict(model, images, indices=torch.arange(24) + 24, **options)
    assert not torch.equal(elsewhere, classes)


@pytest.mark.parametrize("after", [600, 2_000])
def test_a_killed_certification_goes_on(model, data, whole, tmp_path, after):
    options = OPTIONS | {"batch_size": 64, "journal": tmp_path}
    dying = kill_after(after, model)
    with pytest.raises(Killed):
        certify(dying, data, **options)
    done = [line for line in lines(tmp_path)[1:] if line["drawn"] == 170]
    look = 3 * 64  # copies of the first images, before any vote
    assert len(done) >= (after - look - 64) // 170 > 0

    progress = []
    again = kill_after(10**9, model)
    again.__qualname__ = dying.__qualname__
    report = certify(again, data, on_progress=progress.append, **options)
    assert report.certificates == whole
    assert progress[0].decided == len(done) and progress[0].fresh == 0
    last = progress[-1]
    assert (last.decided, last.total, last.fresh) == (24, 24, 24 - len(done))
    assert last.seconds_left == (0, 0)
    numbers = [line["example"] for line in lines(tmp_path)[1:] if line["drawn"] == 170]
    assert sorted(numbers) == list(range(24))  # nothing twice, nothing lost


def test_votes_over_the_image_under_way_are_kept(model, data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PARTIAL_SECONDS", 0.0)
    options = OPTIONS | {"batch_size": 32, "journal": tmp_path, "limit": 1}
    dying = kill_after(3 * 32 + 100, model)
    with pytest.raises(Killed):
        certify(dying, data, **options)
    assert lines(tmp_path)[-1]["drawn"] == 96

    asked = []
    again = kill_after(10**9, model)

    def counting(x):
        asked.append(len(x))
        return again(x)

    counting.__qualname__ = dying.__qualname__
    assert certify(counting, data, **options).certificates == whole[:1]
    assert sum(asked) == 3 * 32 + 170 - 96


def test_a_finished_journal_is_read_and_goes_on_with_more_images(model, data, whole, tmp_path):
    few = certify(model, data, journal=tmp_path, limit=5, **OPTIONS)
    assert few.certificates == whole[:5]
    (tmp_path / "certificates-0.jsonl").open("ab").write(b'{"example": 5, "la')  # a kill
    assert certify(model, data, journal=tmp_path, **OPTIONS).certificates == whole
    assert certify(model, data, journal=tmp_path, limit=5, **OPTIONS).certificates == whole[:5]
    assert len(lines(tmp_path)) == 1 + 24


def test_a_journal_of_something_else_is_refused(model, data, tmp_path):
    images, labels = data
    certify(model, data, journal=tmp_path, limit=4, **OPTIONS)
    for changed in ({"samples": 151}, {"sigma": 0.31}, {"alpha": 0.01}, {"seed": 1}):
        with pytest.raises(JournalError, match="must be as in the journal"):
            certify(model, data, journal=tmp_path, **OPTIONS | changed)
    with pytest.raises(JournalError, match="model must be as in the journal"):
        certify(torch.nn.Sequential(model), data, journal=tmp_path, **OPTIONS)
    changed = images.clone()
    changed[3, 0, 0, 0] = 0
    with pytest.raises(JournalError, match="got another image or label 3"):
        certify(model, (changed, labels), journal=tmp_path, **OPTIONS)
    with pytest.raises(JournalError, match="must not be in use"):
        certify(
            model,
            data,
            journal=tmp_path,
            on_progress=lambda _: certify(model, data, journal=tmp_path, **OPTIONS),
            **OPTIONS,
        )
    (tmp_path / "certificates-0.jsonl").write_text('{"settings": {}}\n')
    with pytest.raises(JournalError, match="must be a journal of certificates"):
        certify(model, data, journal=tmp_path, **OPTIONS)


PROGRAM = """
from dataclasses import astuple
from ironmoe.attacks.certificates import attack_curve, certify

model, data, options = torch.load(sys.argv[1], weights_only=False)
report = certify(model, data, journal="journal", **options)
curve = attack_curve(model, data, [0.5], sigma=0.3, samples=50, draws=2, steps=2, limit=6)
torch.save(([astuple(each) for each in report.certificates], [astuple(i) for i in curve.images]),
           f"found-{rank}.pt")


def fails_at(number):
    # A model of images of which the one with this number has no finite outputs.
    images = torch.arange(24.0).view(24, 1, 1, 1).expand(24, 1, 2, 2) / 24

    def model(x):
        values = 24 * x.flatten(1)[:, :2]
        return values.masked_fill((values[:, :1] - number).abs() < 0.5, float("nan"))

    return model, (images, torch.zeros(24, dtype=torch.int64))


messages = []
few = {"sigma": 1e-4, "samples": 5, "batch_size": 4}
for number in (0, 9):  # at the look of process 0, and under way in process 1
    for call in (
        lambda: certify(*fails_at(number), selection=2, **few),
        lambda: attack_curve(*fails_at(number), [1e-6], draws=2, steps=1, **few),
    ):
        try:
            call()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
torch.save(messages, f"messages-{rank}.pt")
"""


def test_two_processes_find_what_one_finds(model, data, whole, tmp_path):
    torch.save((model, data, OPTIONS), tmp_path / "given.pt")
    run_in_two_processes(
        PROGRAM, tmp_path, "given.pt", before="import ironmoe.attacks.certificates"
    )
    curve = attack_curve(model, data, [0.5], sigma=0.3, samples=50, draws=2, steps=2, limit=6)
    for rank in range(2):
        certificates, images = torch.load(tmp_path / f"found-{rank}.pt")
        assert certificates == [astuple(each) for each in whole]
        assert images == [astuple(image) for image in curve.images]
    messages = [torch.load(tmp_path / f"messages-{rank}.pt") for rank in range(2)]
    for place, number in enumerate([0, 0, 9, 9]):
        here = messages[number % 2][place]
        assert here.startswith("ValueError: model must return finite logits")
        assert f"the image with the number {number} in" in here
        there = messages[1 - number % 2][place]
        assert there == f"RuntimeError: process {number % 2} met {here}"

    written = [len(path.open().readlines()) for path in (tmp_path / "journal").iterdir()]
    assert written == [13, 13]
    alone = certify(model, data, journal=tmp_path / "journal", **OPTIONS)
    assert alone.certificates == whole  # by the journals of both
