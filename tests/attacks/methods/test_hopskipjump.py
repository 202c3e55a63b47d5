"""HopSkipJump: least distances by labels alone."""

import math

import pytest
import torch
from conformance import images as example_images
from conformance import labels_of, network
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks import (
    APGD,
    CW,
    FAB,
    FGSM,
    MIFGSM,
    PGD,
    AutoAttack,
    DeepFool,
    HopSkipJump,
    Regression,
    Square,
    evaluate,
)
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.engine.active_batch import ActiveBatch
from ironmoe.attacks.engine.attempts import blank_attempts
from ironmoe.attacks.methods import hopskipjump
from ironmoe.attacks.methods.parts import hopskipjump_points as points
from ironmoe.attacks.random import example_keys

# Any distance counts, and the nearest point is kept.
ANY = {"eps": math.inf, "early_stop": False}


class Linear:
    """Two classes by the side of a hyperplane between the images, and how far it is from each."""

    def __init__(self, shape=(3, 5, 5), count=6, bounds=(0.0, 1.0)):
        generator = torch.Generator().manual_seed(3)
        pixels = math.prod(shape)
        self.weight = torch.randn(pixels, generator=generator, dtype=torch.float64)
        self.bounds = bounds
        low, high = bounds
        # Many pixels lie at the faces of the box.
        spread = torch.rand(count, *shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3
        self.images = low + (high - low) * spread.clamp(0, 1)
        self.middle = (self.images.flatten(1) @ self.weight).quantile(0.5)
        self.labels = labels_of(self, self.images)

    def score(self, x):
        return x.flatten(1) @ self.weight.to(x.dtype) - self.middle

    def __call__(self, x):
        return torch.stack([-self.score(x), self.score(x)], 1)

    def least(self, norm):
        ball, x = ball_of(norm), self.images
        weight = self.weight.expand(len(x), -1).view_as(x)
        return ball.length(ball.step_to_hyperplane(x, weight, self.score(x), self.bounds))


@pytest.mark.parametrize(
    ("norm", "most", "bounds"), [("L2", 1.04, (-100.0, 155.0)), ("Linf", 1.07, (0.0, 1.0))]
)
def test_it_comes_near_the_least_distance_of_a_linear_model(norm, most, bounds):
    """A few per cent off after 12 iterations, which is what their probes can tell. Many pixels lie
    at the faces of the box."""
    model = Linear(shape=(3, 4, 4), count=4, bounds=bounds)
    attack = HopSkipJump(model, norm=norm, bounds=bounds, steps=12, **ANY)
    result = attack.run(model.images, model.labels)
    ratio = result.distance / model.least(norm)
    assert result.success.all()
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= most


def test_it_asks_for_labels_alone():
    """A model that hides its logits is attacked no worse: every bit is the same."""
    model, x = network(), example_images(5)
    labels = labels_of(model, x)

    def hidden(at):
        return torch.nn.functional.one_hot(model(at).argmax(1), 3).double()

    for norm in ("Linf", "L2"):
        seen, unseen = (
            HopSkipJump(asked, norm=norm, steps=2, **ANY).run(x, labels)
            for asked in (model, hidden)
        )
        assert seen.success.all()
        assert torch.equal(seen.adversarial, unseen.adversarial)
        assert torch.equal(seen.forwards, unseen.forwards)


def test_it_makes_as_many_probes_as_the_paper():
    """100 · √t in iteration t, and beside them few points: 10 of a binary search to 1e-3 in each
    iteration and before, at most 25 halvings of a step; in the end the last point is predicted
    twice, beside the clean image."""
    model = Linear(shape=(1, 3, 3), count=3)
    steps = 7
    result = HopSkipJump(model, norm="L2", steps=steps, **ANY).run(model.images, model.labels)
    probes = sum(int(100 * math.sqrt(t)) for t in range(1, steps + 1))
    beside = result.forwards - probes - 10 * (steps + 1) - 3
    assert (beside >= 1 + steps).all()  # a start, and one point of each step
    assert (beside <= 100 + 25 * steps).all()

    fewer = HopSkipJump(model, norm="L2", steps=steps, initial_probes=40, max_probes=70, **ANY).run(
        model.images, model.labels
    )
    probes = sum(min(int(40 * math.sqrt(t)), 70) for t in range(1, steps + 1))
    beside = fewer.forwards - probes - 10 * (steps + 1) - 3
    assert (beside >= 1 + steps).all()
    assert (beside <= 100 + 25 * steps).all()


def test_it_stops_at_the_first_success_within_eps():
    model = Linear(shape=(1, 4, 4))
    eps = float(1.5 * model.least("L2").max())
    stops = HopSkipJump(model, eps, norm="L2", steps=9).run(model.images, model.labels)
    goes_on = HopSkipJump(model, eps, norm="L2", steps=9, early_stop=False)
    nearest = goes_on.run(model.images, model.labels)
    assert stops.success.all() and nearest.success.all()
    assert torch.equal(stops.steps, nearest.steps)
    assert (stops.forwards < 0.5 * nearest.forwards).all()
    assert (nearest.distance < stops.distance).all()


def test_an_image_without_a_start_holds_where_it_is():
    x = example_images(4)
    result = HopSkipJump(
        lambda at: torch.tensor([[1.0, 0.0]]).expand(len(at), 2), 0.1, start_tries=7
    ).run(x, torch.zeros(4, dtype=torch.int64))
    assert not result.success.any() and not result.found.any()
    assert torch.equal(result.adversarial, x) and not result.distance.any()
    assert (result.forwards == 7 + 2).all()  # the clean prediction, the tries and the last one


def test_a_report_says_where_there_was_no_start():
    """A model that no random image fools: its second class is a dark image."""
    x = torch.full((4, 1, 5, 5), 0.5)
    labels = torch.zeros(4, dtype=torch.int64)

    def model(at):
        return (at.flatten(1).mean(1) < 0.1).long()

    for starts, share in ((None, 1.0), (torch.zeros(1, 1, 5, 5), 0.0)):
        attack = HopSkipJump(model, 0.05, starts=starts, start_tries=5, steps=1)
        report = evaluate(model, (x, labels), {"a": attack})
        (flag,) = [flag for flag in report.checks if flag.name == "no start for HopSkipJump"]
        assert (flag.tripped, flag.value) == (share > 0, share)
        assert not report.attacks["a"].fell.any()


def test_more_restarts_find_what_is_at_least_as_near():
    model = Linear()
    options = {"norm": "L2", "steps": 2, "initial_probes": 20} | ANY
    once, thrice = (
        HopSkipJump(model, restarts=restarts, **options).run(model.images, model.labels)
        for restarts in (1, 3)
    )
    assert (thrice.distance <= once.distance).all()
    assert (thrice.distance < once.distance).any()


def test_targeted_it_reaches_a_class_from_images_of_that_class():
    model, x = network(), example_images(14)
    labels = labels_of(model, x)
    targets = (labels + 1) % 3
    spread = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(5)).double()
    starts = torch.cat([x, spread])
    known = labels_of(model, starts).bincount(minlength=3) > 0
    result = HopSkipJump(model, targeted=True, starts=starts, steps=5, **ANY).run(x, targets)
    reachable = known[targets]
    assert reachable.any()
    assert torch.equal(result.success, reachable)
    assert torch.equal(result.prediction[reachable], targets[reachable])
    assert (result.distance[reachable] < 1).all()


def test_starts_take_the_place_of_random_images():
    """No random image is of the second class here: its only image is black."""
    x = torch.full((3, 1, 2, 2), 0.5)
    labels = torch.zeros(3, dtype=torch.int64)

    def model(at):
        dark = 0.1 - at.flatten(1).mean(1)
        return torch.stack([-dark, dark], 1)

    held = HopSkipJump(model, 0.6, start_tries=20).run(x, labels)
    fell = HopSkipJump(model, 0.6, starts=torch.zeros(1, 1, 2, 2)).run(x, labels)
    assert not held.success.any() and fell.success.all()


def test_what_it_cannot_take_is_refused():
    model, x = network(), example_images(2)
    for options, message in (
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"initial_probes": 0}, "initial_probes must be at least 1, got 0"),
        ({"start_tries": 0}, "start_tries must be at least 1, got 0"),
        ({"gamma": 0.0}, "gamma must be above 0 and finite, got 0"),
        ({"eps": math.inf}, "eps must be finite where early_stop is True, got inf"),
        ({"targeted": True}, "starts must be images for targeted=True"),
        ({"starts": x - 1}, r"starts must lie in bounds = \(0\.0, 1\.0\), got values from -0\."),
        ({"starts": x[:0]}, "starts must be at least one image, got none"),
        ({"norm": "L1"}, "norm must be one of"),
        ({"bounds": (-math.inf, 1.0)}, "bounds must be finite for HopSkipJump"),
    ):
        with pytest.raises(ValueError, match=message):
            HopSkipJump(model, **options)
    with pytest.raises(TypeError, match="starts must be a floating point tensor"):
        HopSkipJump(model, starts=x.long())
    attack = HopSkipJump(model, starts=torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"starts must be images of shape \(1, 4, 4\), got \(3,\)"):
        attack.run(x, labels_of(model, x))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_it_finds_does_not_depend_on_how_many_points_are_asked_about_at_once(
    norm, monkeypatch
):
    model, x = network(), example_images(3)
    labels = labels_of(model, x)
    attack = HopSkipJump(model, norm=norm, steps=2, initial_probes=40, **ANY)
    together = attack.run(x, labels)
    monkeypatch.setattr(hopskipjump, "ROWS_AT_LEAST", 1)
    one_by_one = attack.run(x, labels)
    torch.testing.assert_close(together.adversarial, one_by_one.adversarial, rtol=0, atol=1e-12)
    assert torch.equal(together.forwards, one_by_one.forwards)
    assert torch.equal(together.steps, one_by_one.steps)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_searches_that_ask_about_many_points_at_once_end_at_the_same_boundary(norm, monkeypatch):
    """As on a GPU: fewer rounds, and a linear model has only one boundary on the way."""
    monkeypatch.setattr(points, "ANY_SIZE", ())
    model = Linear(shape=(1, 5, 5), count=4)
    attack = HopSkipJump(model, norm=norm, steps=9, **ANY)
    ratio = attack.run(model.images, model.labels).distance / model.least(norm)
    assert ratio.min() >= 1 - 1e-9 and ratio.max() <= 1.07


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_round_never_waits_for_a_gpu(norm, monkeypatch):
    """On fake tensors whatever needs a value, .item() or a nonzero, raises."""
    monkeypatch.setattr(points, "ANY_SIZE", ())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = ActiveBatch(HopSkipJump(model, 0.1, norm=norm, steps=2), 4, 1, fixed=True)
        labels = torch.zeros(4, dtype=torch.int64)
        batch.attempts = blank_attempts(
            torch.rand(4, 1, 2, 4),
            labels,
            torch.full((4,), 0.1, dtype=torch.float64),
            labels,
            torch.ones(4, dtype=torch.bool),
            example_keys(0, labels, 0),
        )
        batch.attack.start(batch.attempts)
        batch.owners = [None] * 4
        shapes = {name: value.shape for name, value in batch.attempts.items()}
        for _ in range(3):
            batch.round()
        assert {name: value.shape for name, value in batch.attempts.items()} == shapes


def test_a_budget_ends_it_before_it_is_exceeded():
    model = Linear()
    passes = 0

    def counting(at):
        nonlocal passes
        passes += len(at)
        return model(at)

    attack = HopSkipJump(counting, 1e-6)
    report = evaluate(
        counting, (model.images, model.labels), {"a": attack}, max_forwards=900, checks=False
    )
    assert not report.complete
    assert passes <= 900
    assert report.attacks["a"].forwards == passes


@pytest.mark.parametrize(("norm", "most"), [("L2", 1.03), ("Linf", 1.07)])
def test_with_a_radius_for_each_element_it_comes_near_the_least_distance_too(norm, most):
    """Distances count relative to the radii; a third of the elements may not move at all."""
    model = Linear(shape=(3, 4, 4), count=4)
    eps = torch.tensor([0.0, 1.0, 3.0]).repeat(16).view(3, 4, 4)
    attack = HopSkipJump(model, eps, norm=norm, steps=12, early_stop=False)
    result = attack.run(model.images, model.labels)

    ball = ball_of(norm).scaled()(
        model.images, torch.full((4,), 3.0).double(), model.bounds, scale=eps.double() / 3
    )
    weight = model.weight.expand(4, -1).view_as(model.images)
    step = ball.step_onto(model.images, weight, model.score(model.images))
    ratio = result.distance / ball.distance(model.images + step)
    assert result.success.all()
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= most
    assert torch.equal(result.adversarial[:, eps == 0], model.images[:, eps == 0])


@pytest.mark.parametrize(("norm", "eps"), [("L2", 1.0), ("Linf", 0.15)])
def test_a_model_of_labels_alone_falls_as_one_of_logits_does(norm, eps):
    """Integers (B,), also from a numpy function, which has no gradients and takes no tensors."""
    model, x = network(), example_images(14)
    labels = labels_of(model, x)

    def labels_alone(at):
        assert not at.requires_grad
        flat = at.flatten(1).numpy()  # raises for tensors that have a graph
        return model(torch.from_numpy(flat).view_as(at)).argmax(1).to(torch.int32)

    reports = [
        evaluate(asked, (x, labels), [HopSkipJump(asked, eps, norm=norm, steps=6)], checks=False)
        for asked in (model, labels_alone)
    ]
    falls, falls_alone = (next(iter(report.attacks.values())).fell for report in reports)
    assert falls.any()
    assert torch.equal(falls, falls_alone)
    assert reports[1].clean_accuracy.value == 1.0


def test_attacks_that_need_logits_say_which_one_does_not():
    model, x = network(), example_images(3)
    labels = labels_of(model, x)

    def labels_alone(at):
        return model(at).argmax(1)

    for kind in (FGSM, PGD, MIFGSM, APGD, DeepFool, CW):
        message = "got labels .*; HopSkipJump needs no more than labels"
        with pytest.raises(ValueError, match=message):
            kind(labels_alone, 0.1, norm="L2").run(x, labels)
    message = "logits for {}, got labels alone; HopSkipJump needs no more than labels"
    for kind, name in ((Square, "Square"), (FAB, "FAB"), (AutoAttack, "apgd-t")):
        with pytest.raises(TypeError, match=message.format(name)):
            kind(labels_alone, eps=0.1).run(x, labels)


def test_an_answer_that_is_not_finite_is_named_and_can_be_skipped():
    """Of one image alone, at the points around it, not at the image."""
    model = Linear(count=4)

    def breaks(at):
        logits = model(at).clone()
        near_the_second = (at - model.images[1]).flatten(1).norm(dim=1)
        return logits.masked_fill(
            ((near_the_second < 3) & (near_the_second > 0))[:, None], math.nan
        )

    attack = HopSkipJump(breaks, norm="L2", steps=3, **ANY)
    with pytest.raises(ValueError, match="in the data number 1;"):
        attack.run(model.images, model.labels)
    attack = HopSkipJump(breaks, 0.1, norm="L2", steps=3)
    data = model.images, model.labels
    report = evaluate(breaks, data, {"a": attack}, checks=False, on_bad="skip")
    assert report.skipped == [1]


def test_on_a_grid_probes_move_far_enough_to_be_seen():
    """Of 8-bit images a change by less than half a step is none. The least distance is that of the
    plane; what is found lies within two steps of 1/255 of it."""
    model = Linear(shape=(1, 5, 5), count=4)
    images = (model.images * 255).round() / 255
    labels = labels_of(model, images)
    weight = model.weight.expand(4, -1).view_as(images)
    ball = ball_of("Linf")
    step = ball.step_to_hyperplane(images, weight, model.score(images), (0.0, 1.0))
    result = HopSkipJump(model, steps=9, levels=256, **ANY).run(images, labels)
    assert result.success.all()
    assert (result.distance >= ball.length(step) - 1e-9).all()
    assert (result.distance <= ball.length(step) + 2.01 / 255).all()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_it_serves_other_goals_than_labels(norm):
    """The least change that moves a linear regression by its tolerance."""
    model = Linear(shape=(1, 4, 4), count=4)
    images = 0.3 + 0.4 * model.images
    attack = HopSkipJump(model.score, norm=norm, steps=12, goal=Regression(0.5), **ANY)
    result = attack.run(images, model.score(images))
    least = 0.5 / ball_of(norm).dual_length(model.weight.view(1, -1))
    assert result.success.all()
    assert (result.distance >= least * (1 - 1e-9)).all()
    assert (result.distance <= 1.05 * least).all()
