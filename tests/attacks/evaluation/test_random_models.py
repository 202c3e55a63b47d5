"""Verdicts on models that answer each time anew: what counts is how often, never luck."""

import math

import pytest
import scipy.stats
import torch
from torch import nn

from ironmoe.attacks import (
    APGD,
    CW,
    FGSM,
    MIFGSM,
    PGD,
    AutoAttack,
    ExpectedAccuracy,
    Square,
    accuracies,
    compare,
    evaluate,
)
from ironmoe.attacks.engine.judging.passes import ERROR, PASSES, hits_needed
from ironmoe.moe import Capacity, VMoE

TINY = 1e-6  # no image of these models changes its class so near


class Flipping(nn.Module):
    """A linear model that negates its logits with probability ``share``: each image for itself, or
    all images of a call at once."""

    def __init__(self, share=0.1, together=False):
        super().__init__()
        self.share = share
        self.together = together
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        drawn = torch.rand(1 if self.together else len(x), 1, device=x.device)
        return torch.where(drawn < self.share, -logits, logits)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Flipping()


def data(model, count=100):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    return x, model.linear(x.flatten(1)).argmax(1)


def of(report):
    (summary,) = report.attacks.values()
    return summary


ATTACKS = {
    "restarts": lambda model: PGD(model, TINY, steps=40, restarts=5),
    "black box": lambda model: Square(model, TINY, steps=200),
    "the mean of twenty": lambda model: PGD(model, TINY, steps=10, eot=20),
    "autoattack": lambda model: AutoAttack(
        model, eps=TINY, version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"], eot=4
    ),
    "the best point": lambda model: APGD(model, TINY, steps=10, early_stop=False),
}


@pytest.mark.parametrize(
    "attack, together",
    [*((attack, False) for attack in ATTACKS), ("restarts", True), ("the best point", True)],
)
def test_luck_is_no_success(attack, together):
    """The model is right in 90 % of its passes, wherever the attack goes, and that comes out."""
    torch.manual_seed(0)
    model = Flipping(together=together)
    report = evaluate(model, data(model), {attack: ATTACKS[attack](model)})

    assert report.passes == PASSES
    assert not of(report).fell.any() and of(report).clean_correct.all()
    for accuracy in (report.clean_accuracy, report.worst_case):
        assert isinstance(accuracy, ExpectedAccuracy)
        low, high = accuracy.interval(0.9999)
        assert low <= 0.9 <= high
        # Of 100 images · 32 passes, or of 32 passes that all images share, with room for chance.
        assert abs(accuracy.value - 0.9) < (0.25 if together else 0.03)


def test_more_restarts_do_not_find_more(model):
    few, many = (
        evaluate(model, data(model), {"p": PGD(model, TINY, steps=5, restarts=restarts)})
        for restarts in (1, 20)
    )
    assert abs(few.worst_case.value - many.worst_case.value) < 0.03
    assert not of(many).fell.any()


def test_many_attacks_together_are_no_worse_than_one(model):
    """The worst of eight noisy numbers would lie far below each."""
    attacks = {str(seed): PGD(model, TINY, steps=3, seed=seed) for seed in range(8)}
    report = evaluate(model, data(model), attacks)
    assert abs(report.worst_case.value - 0.9) < 0.03


def test_what_an_attack_really_does_is_seen(model):
    """With a radius that crosses every boundary the model is wrong in 90 % of its passes."""
    report = evaluate(model, data(model), {"p": PGD(model, 0.5, steps=20)})
    assert of(report).fell.float().mean() > 0.95
    assert report.clean_accuracy.value > 0.85
    assert report.worst_case.value < 0.2


def test_an_image_that_is_mostly_wrong_is_not_attacked():
    torch.manual_seed(0)
    model = Flipping(share=0.9)
    report = evaluate(model, data(model), {"p": PGD(model, TINY)})
    assert not of(report).clean_correct.any()
    assert abs(report.clean_accuracy.value - 0.1) < 0.03
    assert abs(report.worst_case.value - 0.1) < 0.03
    assert of(report).forwards == 100 * PASSES


def test_each_radius_has_its_number(model):
    report = evaluate(model, data(model, 40), {"p": PGD(model, TINY, steps=5)}, eps=[TINY, 0.5])
    small, large = of(report).curve.values()
    assert abs(small.value - 0.9) < 0.05 and large.value < 0.2
    assert of(report).hits.shape == (40, 3, 2)


def test_a_deterministic_model_is_asked_as_often_as_ever(model):
    model.share = 0.0
    x, y = data(model, 20)
    report = evaluate(model, (x, y), {"f": FGSM(model, TINY)}, checks=False)
    assert report.passes == 1 and of(report).hits.shape == (20, 0, 2)
    assert of(report).forwards == 20 * 3  # the clean image, its gradient, the verdict

    result = FGSM(model, TINY).run(x, y)
    assert result.forwards.tolist() == [3] * 20 and result.passes == 1


@pytest.mark.parametrize("together", [False, True])
def test_one_batch_is_judged_so_too_once_the_model_gives_two_answers(together):
    torch.manual_seed(0)
    model = Flipping(together=together)
    x, y = data(model)
    result = PGD(model, TINY, steps=40).run(x, y)
    assert result.passes == PASSES and not result.success.any() and result.clean_correct.all()
    assert result.hits.shape == (100, 2, 2)
    assert int(result.forwards.min()) > 2 * PASSES

    plain = PGD(model, TINY, steps=2).run(x, y, passes=1)
    assert plain.passes == 1


def test_the_error_of_all_tests_at_one_image_is_what_is_stated():
    """Whatever the number of tests, at the worst model there is: right in half of its passes."""
    total = 0.0
    for earlier in range(20000):
        needed = hits_needed(PASSES, earlier)
        total += float(scipy.stats.binom.sf(needed - 1, PASSES, 0.5))
        if needed > PASSES:
            break
    assert total <= ERROR
    assert hits_needed(1, 5) == 1
    # No fewer hits would do at the first test.
    level = ERROR * 6 / math.pi**2
    needed = hits_needed(PASSES, 0)
    assert scipy.stats.binom.sf(needed - 2, PASSES, 0.5) > level


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.9), (0.5, 1.0), (0.0, 1.0)])
def test_intervals_cover_the_truth(low, high):
    """95 % of the intervals hold the expected accuracy, whether images differ or not."""
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(400):
        share = low + (high - low) * torch.rand(60, generator=generator)
        passes = torch.rand(32, 60, generator=generator) < share
        below, above = ExpectedAccuracy(passes.sum(0), 32).interval()
        covered += below <= (low + high) / 2 <= above
    assert covered / 400 > 0.92  # 3 standard errors below


def test_passes_that_draw_for_all_images_make_intervals_wider():
    right = torch.full((100,), 29)
    apart = ExpectedAccuracy(right + torch.arange(100) % 2, 32, 1.0).interval()
    together = ExpectedAccuracy(right + torch.arange(100) % 2, 32, 100.0).interval()
    assert together[1] - together[0] > 5 * (apart[1] - apart[0])


def test_a_journal_knows_the_passes(model, tmp_path):
    arguments = (model, data(model, 30), {"p": PGD(model, TINY, steps=3)})
    first = evaluate(*arguments, journal=tmp_path)
    again = evaluate(*arguments, journal=tmp_path)  # read, and not asked anew
    assert again.passes == PASSES
    assert torch.equal(of(first).hits, of(again).hits)
    assert first.worst_case.interval() == again.worst_case.interval()


def test_a_cut_journal_of_a_random_model_goes_on(model, tmp_path):
    attacks = {"p": PGD(model, TINY, steps=3)}
    x, y = data(model, 30)
    budget = {"max_forwards": 3500, "batch_size": 10}
    part = evaluate(model, (x, y), attacks, journal=tmp_path, **budget)
    assert not part.complete
    whole = evaluate(model, (x, y), attacks, journal=tmp_path, batch_size=10)
    assert whole.complete and len(whole.clean_correct) == 30
    assert of(whole).decided.all() and abs(whole.worst_case.value - 0.9) < 0.06


def test_a_verdict_over_one_pass_is_said_to_be_one(model):
    report = evaluate(model, data(model), {"p": PGD(model, TINY, steps=40)}, passes=1)
    (flag,) = [flag for flag in report.checks if flag.name == "two answers to one image"]
    assert flag.tripped and "passes=64" in flag.message


@pytest.mark.parametrize("passes", [0, -1, 2, 15, 17])
def test_passes_that_allow_no_verdict_are_refused(model, passes):
    with pytest.raises(ValueError, match="passes must be 1, or an even number of at least 16"):
        evaluate(model, data(model), {"p": PGD(model, TINY)}, passes=passes)
    with pytest.raises(ValueError, match="passes must be 1, or an even number of at least 16"):
        PGD(model, TINY).run(*data(model), passes=passes)
    with pytest.raises(TypeError, match="passes must be None or a whole number, got '16'"):
        PGD(model, TINY).run(*data(model), passes="16")


KEEPING_THE_BEST = {
    "momentum": lambda model: MIFGSM(model, TINY),
    "the least distance": lambda model: CW(model, 1e-5, steps=10, search_steps=2),
    "all the way": lambda model: PGD(model, TINY, steps=10, early_stop=False),
}


@pytest.mark.parametrize("attack", KEEPING_THE_BEST)
def test_a_run_that_keeps_the_best_point_sees_that_the_model_denies_it(model, attack):
    result = KEEPING_THE_BEST[attack](model).run(*data(model))
    assert result.passes == PASSES
    assert bool(result.robust.all())


def test_images_with_two_answers_show_that_a_model_is_random():
    """They are the last of many images, all others of which have one answer."""

    def model(x):
        score = x.flatten(1)[:, :1] - 0.5
        logits = torch.cat([score, -score], 1)
        drawn = torch.rand(len(x), 1) < 0.3
        return torch.where(drawn & (score.abs() < 0.1), -logits, logits)

    torch.manual_seed(0)
    x = torch.full((100, 1, 1, 4), 0.9)
    x[80:] = 0.55
    result = PGD(model, TINY, steps=10).run(x, torch.zeros(100, dtype=torch.int64))
    assert result.passes == PASSES
    assert bool(result.robust.all())


@pytest.mark.parametrize("count", [2, 4])
def test_few_images_are_enough_to_see_that_a_model_is_random(model, count):
    torch.manual_seed(0)
    for seed in range(10):
        report = evaluate(model, data(model, count), {"pgd": PGD(model, TINY, steps=1, seed=seed)})
        assert report.passes == PASSES


def test_tables_have_the_interval_of_a_model_that_draws_for_a_whole_batch():
    torch.manual_seed(0)
    model = Flipping(together=True)
    reports = [evaluate(model, data(model), {"pgd": PGD(model, TINY, steps=2)}) for _ in range(2)]
    report, again = reports
    clean = accuracies(report)[0]
    assert (clean["low"], clean["high"]) == report.clean_accuracy.interval()
    assert any("draws for many images at once" in note for note in compare(report, again).notes)


def test_groups_that_influence_each_other_show_that_a_model_is_random():
    torch.manual_seed(0)
    options = {"image_size": 4, "patch_size": 2, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}
    capacity = Capacity(1.0, images_per_group=4, multiple_of=1)
    inner = VMoE(
        **options, num_classes=3, channels=1, moe_layers=(0,), num_experts=2, capacity=capacity
    ).eval()
    inner.head.weight.data.normal_()

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            logits = self.inner(x)
            return torch.where(torch.rand(len(x), 1) < 0.1, -logits, logits)

    x = torch.rand(32, 1, 4, 4)
    result = PGD(Random(), TINY, steps=10).run(x, inner(x).argmax(1))
    assert result.passes == PASSES
    assert bool(result.robust.all())
