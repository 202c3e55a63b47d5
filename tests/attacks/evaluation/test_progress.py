"""What an evaluation says of the time that is left holds, on a clock that counts passes."""

import time

import pytest
import torch

from ironmoe.attacks import FAB, PGD, AutoAttack, Square, evaluate
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.evaluation.ahead.costs import GUESS

N = 24
EPS = 0.1


class Clock(torch.nn.Module):
    """A model whose passes are the time: a forward pass of an image takes a second, one with a
    gradient three. ``margin`` says how far an image is from the boundary.

    each_call: a call takes so many seconds more, however few images it gets
    noise: of the logits, drawn anew for each call
    """

    def __init__(self, margins, each_call=0, noise=0.0):
        super().__init__()
        self.each_call, self.noise = each_call, noise
        self.register_buffer("margins", torch.as_tensor(margins))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.now = 0.0

    def forward(self, x):
        self.now += (self.each_call + len(x)) * (3 if x.requires_grad else 1)
        # The first pixel names the image; the others are attacked.
        number = (x[:, 0, 0, 0].detach() * 100).round().long().clamp(0, len(self.margins) - 1)
        moved = (x[:, 0, 1:] - 0.5).mean((1, 2))
        score = self.margins[number] - moved + self.weight
        score = score + self.noise * torch.randn(len(score))
        return torch.stack([score, -score, -score - 0.2, -score - 0.3], 1)


def images(count):
    x = torch.full((count, 1, 4, 4), 0.5)
    x[:, 0, 0, 0] = torch.arange(count) / 100
    return x


def eps_of(count):
    """No pixel of the first row moves: it names the image."""
    eps = torch.full((1, 4, 4), EPS)
    eps[:, 0] = 0
    return eps


def replay(monkeypatch, margins, make, *, each_call=0, noise=0.0, **options):
    """(what was said on the way, the report), on the clock of the model."""
    torch.manual_seed(0)
    model = Clock(margins, each_call, noise)
    monkeypatch.setattr(time, "perf_counter", lambda: model.now)
    monkeypatch.setattr(time, "monotonic", lambda: model.now)
    said = []
    data = images(len(margins)), torch.zeros(len(margins), dtype=torch.int64)
    options = {"checks": False, "batch_size": 8} | options
    report = evaluate(model, data, make(model), on_progress=said.append, **options)
    return said, report


def autoattack(model):
    """The standard parts, each with few queries."""
    attack = AutoAttack(
        model, eps=eps_of(N), version="custom", attacks_to_run=["apgd-ce", "apgd-t", "square"]
    )
    attack.apgd.n_iter = 8
    attack.apgd_targeted.n_iter = 8
    attack.apgd_targeted.n_target_classes = 3
    attack.square.n_queries = 50
    return {"autoattack": attack}


ROBUST = [1.0] * N
FALLING = [0.01] * N
MIXED = [0.01, 1.0, -0.5] * (N // 3)
MAKES = {
    "pgd": lambda model: {"pgd": PGD(model, eps_of(N), steps=10, restarts=2)},
    "square": lambda model: {"square": Square(model, eps_of(N), steps=60)},
    "autoattack": autoattack,
    "several": lambda model: {
        "pgd": PGD(model, eps_of(N), steps=10),
        "fab": FAB(model, eps_of(N), steps=5, targets=3),
    },
    "eot": lambda model: {"pgd": PGD(model, eps_of(N), steps=10, eot=4)},
    "restarts": lambda model: {
        "pgd": PGD(model, eps_of(N), steps=5, restarts=3),
        "square": Square(model, eps_of(N), steps=30, restarts=3),
    },
}


MODELS = {"robust": ROBUST, "falling": FALLING, "mixed": MIXED}
FEW = [0.01] * (N - 2) + [1.0] * 2  # all but two fall, and batches are nearly empty
TINY = 1e-6  # sums of floats


def contains(ends, truth):
    return ends[0] * (1 - TINY) <= truth <= ends[1] * (1 + TINY)


def check_ends(said):
    """All that was said of what is left was true."""
    end = said[-1]
    for progress in said:
        assert contains(progress.forwards_left, end.forwards - progress.forwards), progress
        assert contains(progress.seconds_left, end.seconds - progress.seconds), progress
    assert end.seconds_left == (0, 0) and end.forwards_left == (0, 0)


# A pass of an image takes as long in any batch, or each call takes as long as 5 images besides.
CALLS = {"by image": 0, "by call": 5}


@pytest.mark.parametrize("each_call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(MAKES))
def test_the_time_left_contains_the_truth(monkeypatch, name, kind, each_call):
    said, report = replay(monkeypatch, MODELS[kind], MAKES[name], each_call=each_call)
    robust = report.worst_case.value
    assert {"robust": robust == 1, "falling": robust == 0, "mixed": 0 < robust < 1}[kind]
    check_ends(said)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", ["pgd", "several", "eot"])
def test_verdicts_of_many_passes_count(monkeypatch, name, kind):
    said, _ = replay(monkeypatch, MODELS[kind], MAKES[name], each_call=5, passes=16)
    check_ends(said)


@pytest.mark.parametrize("passes", [1, 16])
@pytest.mark.parametrize("name", ["pgd", "eot", "restarts"])
def test_a_random_model_may_deny_every_success(monkeypatch, name, passes):
    options = {"each_call": 5, "noise": 0.1, "passes": passes}
    said, _ = replay(monkeypatch, FALLING, MAKES[name], **options)
    check_ends(said)


@pytest.mark.parametrize("batch_size", [3, 16, 64])
def test_batches_of_other_sizes_count(monkeypatch, batch_size):
    options = {"each_call": 5, "batch_size": batch_size}
    said, _ = replay(monkeypatch, MIXED, MAKES["restarts"], **options)
    check_ends(said)


def test_a_budget_of_passes_may_end_it_at_once(monkeypatch):
    options = {"each_call": 5, "batch_size": 16, "max_forwards": 300}
    said, report = replay(monkeypatch, MIXED, MAKES["restarts"], **options)
    assert not report.complete
    end = said[-1]
    assert all(contains(p.forwards_left, end.forwards - p.forwards) for p in said)
    assert all(contains(p.seconds_left, end.seconds - p.seconds) for p in said)


@pytest.mark.parametrize(("name", "kind"), [("pgd", "robust"), ("pgd", "mixed"), ("eot", "mixed")])
def test_free_places_of_a_gpu_and_rounds_after_the_end_count(monkeypatch, name, kind):
    plain = Engine.__init__

    def on_a_gpu(engine, *args, **options):
        plain(engine, *args, **options)
        engine.kind = "cuda"

    monkeypatch.setattr(Engine, "__init__", on_a_gpu)
    said, _ = replay(monkeypatch, MODELS[kind], MAKES[name], each_call=5)
    check_ends(said)


def test_the_range_is_no_excuse(monkeypatch):
    said, report = replay(monkeypatch, ROBUST, MAKES["pgd"], checks=True)
    assert report.worst_case.value == 1
    end = said[-1]
    measured = [progress for progress in said if progress.at_work]
    assert len(measured) > 50
    # Where every image holds, each attempt may be judged twice, and some attempts end early: they
    # come back to a point where they have been.
    assert all(p.forwards_left[1] <= 1.5 * (end.forwards - p.forwards) + 2 * N for p in measured)
    # Besides, the last image may be alone for 2 attempts of 10 rounds, each at most as long as a
    # full one of 8 images and 3 seconds.
    late = 2 * 10 * 8 * 3
    assert all(p.seconds_left[1] <= 2 * (end.seconds - p.seconds) + late for p in measured[1:])


@pytest.mark.parametrize("margins", [ROBUST, MIXED, FEW], ids=["robust", "mixed", "few"])
def test_a_full_batch_is_not_expected_at_the_pace_of_single_images(monkeypatch, margins):
    options = {"each_call": 40, "batch_size": 64}
    said, _ = replay(monkeypatch, margins, MAKES["autoattack"], **options)
    check_ends(said)
    end = said[-1]
    measured = [p for p in said[1:] if end.seconds - p.seconds > 0.1 * end.seconds]
    # A guess may be off by GUESS, and a round may have half of the passes that it is bounded by.
    for p in measured:
        beyond_time = p.seconds_left[1] / (end.seconds - p.seconds)
        beyond_passes = p.forwards_left[1] / (end.forwards - p.forwards)
        assert beyond_time <= 2 * GUESS * beyond_passes, p


def test_proposals_of_square_that_no_query_was_about_are_not_left(monkeypatch):
    options = {"each_call": 5, "batch_size": 32, "checks": True}
    said, _ = replay(monkeypatch, ROBUST, MAKES["square"], **options)
    check_ends(said)
    # Half of the proposals are the image itself. When the first image is done, others have made
    # most of their 61 steps: at most a third of the rounds is left, each of at most 128 passes.
    first = next(p for p in said if p.decided)
    assert first.forwards_left[1] <= 128 * 61 / 3


# How far off the expected time may be: images are few, and how batches empty is not foreseen.
OFF = 4.0


@pytest.mark.parametrize("kind", ["robust", "mixed"])
@pytest.mark.parametrize("name", list(MAKES))
def test_a_time_is_expected_from_the_falls_and_paces_so_far(monkeypatch, name, kind):
    for options in ({"each_call": 5}, {"each_call": 40, "batch_size": 16}, {"passes": 16}):
        said, _ = replay(monkeypatch, MODELS[kind], MAKES[name], **options)
        end = said[-1]
        measured = [p for p in said if 0.1 < p.seconds / end.seconds < 0.9]
        known = [p for p in measured if p.seconds_expected is not None]
        assert len(known) >= len(measured) / 2
        for p in known:
            truth = end.seconds - p.seconds
            assert truth / OFF <= p.seconds_expected <= OFF * truth, p
            assert p.seconds_left[0] <= p.seconds_expected <= p.seconds_left[1]


def test_no_time_is_expected_before_anything_was_seen(monkeypatch):
    said, _ = replay(monkeypatch, ROBUST, MAKES["autoattack"])
    assert said[0].seconds_expected is None
    undecided = [p for p in said if not p.decided and p.seconds_expected is not None]
    assert len(undecided) > 10  # it needs no verdict


def test_images_not_begun_are_expected_to_fall_as_those_before_them(monkeypatch):
    said, _ = replay(monkeypatch, [0.01] * 80 + [1.0] * 4, lambda m: {"pgd": PGD(m, EPS, steps=40)})
    half = [p for p in said if 30 <= p.decided <= 50]
    # Did they all hold, each image would need 40 queries, of 3 seconds each.
    assert half and all(p.seconds_expected < (84 - p.decided) * 40 * 3 / 3 for p in half)


def test_it_says_which_part_is_at_work_before_anything_is_decided(monkeypatch):
    said, _ = replay(monkeypatch, ROBUST, MAKES["autoattack"])
    parts = list(dict.fromkeys(progress.at_work for progress in said))
    assert parts == ["", "apgd-ce", "apgd-t", "square"]  # the first before anything was asked
    undecided = [progress for progress in said if not progress.decided]
    assert len(undecided) > 20
    assert all(p.seconds_left[0] < p.seconds_left[1] for p in undecided)


def test_radii_and_groups_of_restarts_count(monkeypatch):
    for kind, margins in MODELS.items():
        radii = [0.02, 0.05, EPS]
        said, _ = replay(
            monkeypatch, margins, lambda model: {"pgd": PGD(model, EPS, steps=5)}, eps=radii
        )
        end = said[-1]
        assert all(contains(p.seconds_left, end.seconds - p.seconds) for p in said), kind


def test_a_run_that_goes_on_counts_what_is_left(monkeypatch, tmp_path):
    whole, _ = replay(monkeypatch, MIXED, MAKES["several"])
    half = whole[len(whole) // 2].forwards
    options = {"journal": tmp_path, "each_call": 5}
    replay(monkeypatch, MIXED, MAKES["several"], max_forwards=half, **options)
    said, _ = replay(monkeypatch, MIXED, MAKES["several"], **options)
    check_ends(said)
    assert said[0].forwards_left[1] < whole[0].forwards_left[1] / 1.5


def test_no_more_is_left_than_the_budget_allows(monkeypatch):
    said, report = replay(monkeypatch, ROBUST, MAKES["pgd"], max_seconds=100)
    assert not report.complete
    assert all(p.seconds_left[1] <= max(0, 100 - p.seconds) for p in said)
    said, report = replay(monkeypatch, ROBUST, MAKES["pgd"], max_forwards=100)
    assert not report.complete
    assert all(p.forwards_left[1] <= 100 - p.forwards for p in said)
    # Before anything was asked with a gradient, a call of that takes 3 times as long as the
    # first one, which was of 8 images; each of 100 passes may be such a call.
    assert all(p.seconds_left[1] <= (3 * GUESS + 1) * 8 * 100 for p in said)


def test_data_of_unknown_length_have_no_time_left(monkeypatch):
    model = Clock(ROBUST)
    batches = ((images(N)[:8], torch.zeros(8, dtype=torch.int64)) for _ in range(2))
    said = []
    attacks = {"pgd": PGD(model, EPS, steps=2)}
    evaluate(model, batches, attacks, batch_size=8, checks=False, on_progress=said.append)
    assert said[0].seconds_left is None and said[0].forwards_left is None
