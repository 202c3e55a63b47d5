"""What an evaluation says of the time that is left holds, on a clock that counts passes."""

import time

import pytest
import torch

from ironmoe.attacks import FAB, PGD, AutoAttack, Square, evaluate
from ironmoe.attacks.evaluation.progress import GUESS

N = 24
EPS = 0.1


class Clock(torch.nn.Module):
    """A model whose passes are the time: a forward pass of an image takes a second, one with a
    gradient three. ``margin`` says how far an image is from the boundary."""

    def __init__(self, margins):
        super().__init__()
        self.register_buffer("margins", torch.as_tensor(margins))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.now = 0.0

    def forward(self, x):
        self.now += len(x) * (3 if x.requires_grad else 1)
        # The first pixel names the image; the others are attacked.
        number = (x[:, 0, 0, 0].detach() * 100).round().long().clamp(0, len(self.margins) - 1)
        moved = (x[:, 0, 1:] - 0.5).mean((1, 2))
        score = self.margins[number] - moved + self.weight
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


def replay(monkeypatch, margins, make, **options):
    """(what was said on the way, the report), on the clock of the model."""
    model = Clock(margins)
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
}


MODELS = {"robust": ROBUST, "falling": FALLING, "mixed": MIXED}
TINY = 1e-6  # sums of floats


def contains(ends, truth):
    return ends[0] * (1 - TINY) <= truth <= ends[1] * (1 + TINY)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(MAKES))
def test_the_time_left_contains_the_truth(monkeypatch, name, kind):
    said, report = replay(monkeypatch, MODELS[kind], MAKES[name])
    robust = report.worst_case.value
    assert {"robust": robust == 1, "falling": robust == 0, "mixed": 0 < robust < 1}[kind]

    end = said[-1]
    for progress in said:
        assert contains(progress.forwards_left, end.forwards - progress.forwards), progress
        assert contains(progress.seconds_left, end.seconds - progress.seconds), progress
    assert end.seconds_left == (0, 0) and end.forwards_left == (0, 0)


def test_the_range_is_no_excuse(monkeypatch):
    said, _ = replay(monkeypatch, ROBUST, MAKES["pgd"])
    end = said[-1]
    measured = [progress for progress in said if progress.at_work]
    assert len(measured) > 50
    # Where every image holds, the longest time is the truth, up to a batch of attempts that an
    # image needs no more queries for: 8 images, 11 queries of 3 seconds.
    late = 8 * 11 * 3
    assert all(p.seconds_left[1] <= end.seconds - p.seconds + late for p in measured)


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
    replay(monkeypatch, MIXED, MAKES["several"], journal=tmp_path, max_forwards=half)
    said, _ = replay(monkeypatch, MIXED, MAKES["several"], journal=tmp_path)
    end = said[-1]
    assert all(contains(p.seconds_left, end.seconds - p.seconds) for p in said)
    assert said[0].forwards_left[1] < whole[0].forwards_left[1] / 1.5


def test_no_more_is_left_than_the_budget_allows(monkeypatch):
    said, report = replay(monkeypatch, ROBUST, MAKES["pgd"], max_seconds=100)
    assert not report.complete
    assert all(p.seconds_left[1] <= max(0, 100 - p.seconds) for p in said)
    said, report = replay(monkeypatch, ROBUST, MAKES["pgd"], max_forwards=100)
    assert not report.complete
    assert all(p.forwards_left[1] <= 100 - p.forwards for p in said)
    assert all(p.seconds_left[1] <= 3 * GUESS * 100 for p in said)


def test_data_of_unknown_length_have_no_time_left(monkeypatch):
    model = Clock(ROBUST)
    batches = ((images(N)[:8], torch.zeros(8, dtype=torch.int64)) for _ in range(2))
    said = []
    attacks = {"pgd": PGD(model, EPS, steps=2)}
    evaluate(model, batches, attacks, batch_size=8, checks=False, on_progress=said.append)
    assert said[0].seconds_left is None and said[0].forwards_left is None
