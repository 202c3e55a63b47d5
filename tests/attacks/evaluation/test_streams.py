"""An evaluation of a stream is that of its tensors, whatever cannot be read and who reads it."""

import pytest
import torch
import toys
from pictures import Numbers
from torch import nn
from two_processes import run_in_two_processes

from ironmoe.attacks import FGSM, PGD, evaluate
from ironmoe.attacks.data import ImageStream, Item, Preprocessing, UnreadableImage
from ironmoe.moe import Capacity

EPS = 0.06
PIPELINE = Preprocessing(channels=1, resize=(12, 12), mode="exact")
FIELDS = ("clean_correct", "fell", "decided", "prediction", "distance", "steps", "found")
IMAGES, LABELS = toys.blobs()
BYTES = (IMAGES * 255).round().to(torch.uint8)
PIXELS = BYTES.float() / 255


class Blobs(Numbers):
    """The blobs, 8 bits each."""

    def __init__(self, bad=()):
        super().__init__(len(BYTES), bad)
        self.labels = LABELS

    def read(self, number, channels):
        self.asked.append(number)
        if number in self.bad:
            raise UnreadableImage(f"number {number} is damaged")
        return Item(BYTES[number], int(LABELS[number]))


class Wide(nn.Module):
    """The same model in float64, so that products of other batches round alike."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.double())


def stream(bad=(), workers=0, **options):
    return ImageStream(Blobs(bad), PIPELINE, workers=workers, skip_bad=bool(bad), **options)


@pytest.fixture(scope="module")
def model():
    return Wide(toys.mlp(PIXELS, LABELS)).eval()


@pytest.fixture(scope="module")
def coupled():
    options = {"capacity": Capacity(0.5, images_per_group=4, multiple_of=1)}
    return Wide(toys.vmoe(PIXELS, LABELS, **options)).eval()


def attacks(model, steps):
    return {"fgsm": FGSM(model, EPS), "pgd": PGD(model, EPS, steps=steps, restarts=2)}


def same(one, other, rows=slice(None)):
    """All that two reports say about these images."""
    for name, summary in one.attacks.items():
        for field in FIELDS:
            mine, wanted = getattr(summary, field), getattr(other.attacks[name], field)
            torch.testing.assert_close(mine[rows], wanted[rows], rtol=1e-6, atol=1e-9, msg=field)
        torch.testing.assert_close(
            summary.adversarial[rows], other.attacks[name].adversarial[rows], rtol=0, atol=1e-6
        )
    return True


def run(model, data, steps=4, **options):
    options = {"batch_size": 16, "keep_adversarial": True, "checks": False} | options
    return evaluate(model, data, attacks(model, steps), **options)


@pytest.fixture(scope="module")
def wanted(model):
    return run(model, (PIXELS, LABELS))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_evaluated_as_its_tensors(model, wanted, workers):
    assert 0 < wanted.worst_case.count < len(LABELS)
    report = run(model, stream(workers=workers))
    assert same(report, wanted) and report.skipped == [] and report.unread == 0


def test_the_checks_look_at_the_first_images_of_a_stream(model):
    options = {"checks": True}
    flags = [run(model, data, **options).checks for data in (stream(), (PIXELS, LABELS))]
    assert [f.name for f in flags[0]] == [f.name for f in flags[1]]
    assert run(model, stream(bad=range(100)), **options).worst_case.total == 20


@pytest.mark.parametrize("bad", [[0], [7, 8, 33, 119], list(range(64)), list(range(1, 120))])
def test_images_that_cannot_be_read_are_skipped_and_change_no_other(model, wanted, bad):
    report = run(model, stream(bad))
    good = torch.tensor([n for n in range(120) if n not in bad])
    assert same(report, wanted, good)
    assert report.skipped == bad and report.complete
    assert report.clean_accuracy.total == report.worst_case.total == len(good)
    summary = report.attacks["pgd"]
    assert summary.decided.all() and not summary.fell[bad].any()


def test_nothing_but_bad_images_is_an_empty_report(model):
    report = run(model, stream(range(120)))
    assert report.skipped == list(range(120)) and report.worst_case.total == 0


def test_some_rows_are_the_data_and_have_the_numbers_of_the_stream(model, wanted):
    rows = torch.tensor([5, 100, 17, 33])
    report = run(model, stream(rows=rows))
    assert torch.equal(report.clean_correct, wanted.clean_correct[rows])
    report = run(model, stream(bad=[17], rows=rows))
    assert report.skipped == [2]


class Bright(Blobs):
    """The blobs without black."""

    def read(self, number, channels):
        image, label = super().read(number, channels)
        return Item(image.clamp(60, 200), label)


@pytest.mark.parametrize("by_image", [False, True])
def test_a_bad_image_lies_in_the_bounds_wherever_these_are(model, by_image):
    data = ImageStream(Bright(bad=(7, 50)), PIPELINE, workers=0, skip_bad=True)
    pixels = BYTES.clamp(60, 200).float() / 255
    bounds = (torch.full((120, 1, 1, 1), 0.2), 0.8) if by_image else (0.2, 0.8)
    mask = torch.ones(120, 1, 12, 12)
    mask[::2, :, :6] = 0
    attack = {"pgd": PGD(model, EPS * mask if by_image else EPS, steps=3, bounds=bounds)}
    options = {"batch_size": 16, "keep_adversarial": True, "checks": False}
    report = evaluate(model, data, attack, **options)
    assert report.skipped == [7, 50]
    good = torch.tensor([n for n in range(120) if n not in (7, 50)])
    assert same(report, evaluate(model, (pixels, LABELS), attack, **options), good)


class Killed(Exception):
    pass


@pytest.mark.parametrize("bad", [(), (3, 40, 41)])
def test_a_killed_evaluation_of_a_stream_goes_on(model, tmp_path, bad):
    def kill(progress):
        if progress.decided >= 100:
            raise Killed

    with pytest.raises(Killed):
        run(model, stream(bad), journal=tmp_path, on_progress=kill)
    report = run(model, stream(bad), journal=tmp_path)
    assert same(report, run(model, stream(bad)))
    assert report.skipped == list(bad)

    asked = []
    again = run(model, stream(bad), journal=tmp_path, on_progress=lambda p: asked.append(p.fresh))
    assert same(again, report) and set(asked) <= {0}


def test_another_image_is_another_evaluation(model, tmp_path):
    run(model, stream(), journal=tmp_path)
    rows = torch.arange(120)
    rows[50] = 51
    with pytest.raises(ValueError, match="50"):
        run(model, stream(rows=rows), journal=tmp_path)


def test_images_that_couple_each_other_are_evaluated_as_their_tensors(coupled):
    report = run(coupled, stream(), steps=1)
    assert same(report, run(coupled, (PIXELS, LABELS), steps=1))


@pytest.mark.parametrize("bad", [[5], [0, 1, 2, 3, 119]])
def test_a_bad_image_keeps_its_place_in_its_group_and_is_black(coupled, bad):
    """The others of its group are predicted beside it; that nobody attacks them is no success."""
    report = run(coupled, stream(bad), steps=1)
    black = PIXELS.clone()
    black[bad] = 0
    wanted = run(coupled, (black, LABELS), steps=1)
    groups = {number // 4 for number in bad}
    others = torch.tensor([n for n in range(120) if n // 4 not in groups])
    assert same(report, wanted, others)
    assert set(bad) <= set(report.skipped)
    assert {number // 4 for number in report.skipped} == groups


PROGRAM = """
model = streams.Wide(torch.load("model.pt", weights_only=False))
report = run(model, stream(bad=(9, 64)), journal="journal")
asked = sorted(set(DATA.asked))
units = torch.tensor(asked)
assert (units % 2 == rank).all() and len(units) == 60, asked
if rank == 0:
    torch.save([report.skipped, *({f: getattr(s, f) for f in (*FIELDS, "adversarial")}
               for s in report.attacks.values())], "out.pt")
"""
BEFORE = """
import importlib.util
from pathlib import Path
sys.path.insert(0, {support!r})
spec = importlib.util.spec_from_file_location("streams", {file!r})
streams = importlib.util.module_from_spec(spec)
sys.modules["streams"] = streams
spec.loader.exec_module(streams)
run, FIELDS, DATA = streams.run, streams.FIELDS, streams.Blobs((9, 64))

def stream(bad):
    return streams.ImageStream(DATA, streams.PIPELINE, workers=0, skip_bad=True)
"""


def test_two_processes_read_their_share_alone_and_find_what_one_finds(model, tmp_path):
    torch.save(model.model, tmp_path / "model.pt")
    support = toys.__file__.rpartition("/")[0]
    before = BEFORE.format(support=support, file=__file__)
    run_in_two_processes(PROGRAM, tmp_path, before=before)
    skipped, *found = torch.load(tmp_path / "out.pt")
    alone = run(model, stream(bad=(9, 64)))
    assert skipped == alone.skipped == [9, 64]
    for summary, wanted in zip(found, alone.attacks.values(), strict=True):
        for field, value in summary.items():
            torch.testing.assert_close(value, getattr(wanted, field), rtol=1e-6, atol=1e-6)
