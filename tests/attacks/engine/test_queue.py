"""The queue: the same verdicts as a plain loop, at less cost, whatever the batch."""

import time

import pytest
import torch
import toys

from ironmoe.attacks import PGD, Attack, FrozenRouting, Square, evaluate
from ironmoe.attacks.random import example_keys

EPS = 0.02


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs()
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.vmoe(data[0].float(), data[1])


def plain_pgd(model, images, labels, eps, steps, restarts, seed=0):
    """The textbook loop over the whole batch: every image walks all the way in every restart."""
    fell = torch.zeros_like(labels, dtype=torch.bool)
    right = model(images).argmax(1) == labels
    attack = PGD(model, eps, steps=steps, seed=seed)
    radii = torch.full(labels.shape, eps, dtype=torch.float64)
    ball = attack.ball({"clean": images, "eps": radii})
    for restart in range(restarts):
        x = ball.random_point(example_keys(seed, torch.arange(len(labels)), restart))
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            logits = model(x)
            fell |= logits.argmax(1) != labels
            if step < steps:
                (grad,) = torch.autograd.grad(
                    torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), [x]
                )
                x = (
                    (x + max(2.5 / steps, 0.1) * eps * grad.sign())
                    .clamp(images - eps, images + eps)
                    .clamp(0, 1)
                )
    return right & fell, right


@pytest.mark.parametrize("batch_size", [7, 32, 200])
def test_the_verdict_is_that_of_a_plain_loop(model, data, batch_size):
    data = data[0][:60], data[1][:60]
    expected, right = plain_pgd(model, *data, EPS, 8, 2)
    report = evaluate(
        model,
        data,
        {"pgd": PGD(model, EPS, steps=8, restarts=2)},
        batch_size=batch_size,
        checks=False,
    )
    assert torch.equal(report.attacks["pgd"].fell, expected) and torch.equal(
        report.clean_correct, right
    )
    assert 5 < expected.sum() < 55


def test_adversarial_images_do_not_depend_on_the_batch_either(model, data):
    data, attack = (data[0][:60], data[1][:60]), PGD(model, EPS, steps=8, restarts=2)
    kept = [
        evaluate(
            model, data, {"pgd": attack}, batch_size=size, keep_adversarial=True, checks=False
        ).attacks["pgd"]
        for size in (11, 60)
    ]
    torch.testing.assert_close(kept[0].adversarial, kept[1].adversarial, rtol=0, atol=1e-9)
    assert torch.equal(kept[0].steps, kept[1].steps)


def test_the_batch_stays_full_and_each_image_pays_only_for_itself(data):
    images, labels = data
    inner = toys.mlp(images.float(), labels)
    sizes = []

    def model(x):
        sizes.append(len(x))
        return inner(x)

    attack = PGD(model, 0.1, steps=20, restarts=2)
    report = evaluate(model, data, {"pgd": attack}, batch_size=16, checks=False)
    summary = report.attacks["pgd"]
    assert max(sizes) <= 16 and summary.fell.any()
    assert sum(sizes) == summary.forwards
    assert summary.backwards <= 2 * 20 * 120  # restarts × steps of each image at most
    assert sum(size >= 14 for size in sizes[1:]) > 0.4 * len(sizes[1:])


def test_a_larger_radius_is_tried_only_on_what_held(model, data):
    radii = [0.01, 0.02, 0.03]
    attack = PGD(model, steps=10)
    swept = evaluate(model, data, {"pgd": attack}, eps=radii[::-1], checks=False).attacks["pgd"]
    singles = [
        evaluate(model, data, {"pgd": PGD(model, e, steps=10)}, checks=False).attacks["pgd"]
        for e in radii
    ]
    falls = torch.zeros(120, dtype=torch.bool)
    for eps, single in zip(radii, singles, strict=True):
        # what fell at a smaller radius counts, also where the larger search missed it
        falls |= single.fell
        assert torch.equal(swept.robust_at(eps), swept.clean_correct & ~falls)
    assert swept.forwards < sum(s.forwards for s in singles)
    assert list(swept.curve) == radii and [p.count for p in swept.curve.values()] == sorted(
        [p.count for p in swept.curve.values()], reverse=True
    )


class Stepped(Attack):
    """Asks about the clean image ``steps`` times; misclassification is decided by the model below,
    by attempt."""

    def __init__(self, model, steps=3, restarts=5):
        super().__init__(model, 1.0)
        self.max_queries, self.restarts, self.gradient = steps, restarts, False

    def start(self, attempts):
        # attempt a marks its images with the value a / 10 through the key, which is all a row knows
        # of it
        keys = torch.stack(
            [example_keys(self.seed, torch.arange(8), a) for a in range(self.restarts)]
        )
        attempt = (keys[:, :, None] == attempts["key"]).any(1).to(torch.float64).argmax(0)
        attempts["point"] = (attempt / 10)[:, None].expand_as(attempts["clean"]).clone()

    def advance(self, attempts, logits, loss, grad):
        attempts["finished"] = attempts["queries"] >= self.max_queries


def test_a_success_cancels_later_siblings_and_waits_for_earlier_ones():
    """Attempts 2 and 4 succeed at once, the earlier ones never: siblings run side by side in a
    batch with room."""
    asked = []

    def model(x):
        asked.append(x[:, 0].tolist())
        hit = ((x[:, 0] - 0.2).abs() < 0.01) | ((x[:, 0] - 0.4).abs() < 0.01)
        return torch.stack([torch.ones_like(x[:, 0]), 2.0 * hit], 1)

    images, labels = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    report = evaluate(
        model,
        (images, labels),
        {"s": Stepped(model)},
        batch_size=8,
        keep_adversarial=True,
        checks=False,
    )
    summary = report.attacks["s"]
    assert summary.fell.all() and torch.allclose(
        summary.adversarial, torch.full((1, 3), 0.2, dtype=torch.float64)
    )
    assert max(len(points) for points in asked) > 1  # side by side
    alone = evaluate(
        model,
        (images, labels),
        {"s": Stepped(model, restarts=3)},
        batch_size=1,
        keep_adversarial=True,
        checks=False,
    )
    assert torch.equal(alone.attacks["s"].adversarial, summary.adversarial)


def test_what_is_not_confirmed_goes_on():
    """The search's model is wrong about every image from the second step on; the full-precision one
    falls at the fourth."""

    images, labels = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
    options = {"alpha": 0.1, "random_start": False, "attack_dtype": torch.bfloat16}
    result = PGD(toys.Fragile(), 0.5, steps=6, **options).run(images, labels)
    assert (
        result.success.all()
        and (result.adversarial[:, 0] > 0.35).all()
        and (result.adversarial[:, 0] < 0.45).all()
    )
    # Questions at 0, .1, .2, .3, .4; of those .2 and .3 found and not confirmed, .4 confirmed; and
    # the clean image.
    assert (
        (result.forwards == 1 + 5 + 3).all()
        and (result.backwards == 5).all()
        and (result.steps == 4).all()
    )
    short = PGD(toys.Fragile(), 0.25, steps=6, **options).run(images, labels)
    assert short.found.all() and not short.success.any() and short.robust.all()


class TestCircles:
    def test_they_end_an_attempt_and_change_no_verdict(self):
        weight = torch.randn(2, 10, dtype=torch.float64)

        def model(x):
            return x @ weight.T

        images = torch.rand(40, 10, dtype=torch.float64)
        labels = model(images).argmax(1)
        attack = PGD(model, 0.01, steps=50, alpha=0.003)
        result = attack.run(images, labels)
        attack._circles = False
        plain = attack.run(images, labels)
        assert torch.equal(result.success, plain.success) and not result.success.all()
        held = result.robust
        assert (result.backwards[held] <= 12).all() and (plain.backwards[held] == 50).all()
        torch.testing.assert_close(result.adversarial, plain.adversarial)

    def test_a_point_that_only_nearly_comes_back_is_another_point(self):
        from ironmoe.attacks.methods.parts.fingerprint import fingerprint

        points = torch.rand(50, 3, 4, dtype=torch.float64)
        points[1] = points[0]
        points[2] = points[0].nextafter(torch.ones(()).double())
        prints = fingerprint(points)
        assert prints[0] == prints[1] and len(set(prints.tolist())) == 49
        swapped = points[0].flatten().flip(0).view(1, 3, 4)
        assert fingerprint(swapped)[0] != prints[0]


class TestBudget:
    @pytest.mark.parametrize("limit", [0, 39, 100, 200, 777])
    def test_forwards_are_never_more(self, model, data, limit):
        made = []
        handle = model.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
        report = evaluate(
            model,
            data,
            {"pgd": PGD(model, EPS, steps=30)},
            max_forwards=limit,
            batch_size=40,
            checks=False,
        )
        handle.remove()
        assert sum(made) <= limit and (limit < 200 or sum(made) > limit - 80)
        assert not report.complete
        summary = report.attacks["pgd"]
        assert len(summary.decided) <= 120 and bool((~summary.decided).any()) == (limit >= 40)
        assert torch.equal(summary.undecided_at(EPS), summary.clean_correct & ~summary.decided)

    def test_time(self, model, data):
        report = evaluate(
            model,
            data,
            {"pgd": PGD(model, EPS, steps=10000, alpha=0.001)},
            max_seconds=0.5,
            checks=False,
        )
        assert not report.complete
        with pytest.raises(ValueError, match="max_seconds must be at least 0"):
            evaluate(model, data, {"pgd": PGD(model, EPS)}, max_seconds=-1)

    @pytest.mark.parametrize("limit", range(0, 60, 3))
    def test_what_is_not_confirmed_never_goes_beyond_it(self, limit):
        """Candidates that are refused are asked for once more, which the budget may forbid: then
        the run ends."""
        model, made = toys.Fragile(), []
        model.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
        attack = PGD(
            model, 0.25, steps=6, alpha=0.1, random_start=False, attack_dtype=torch.bfloat16
        )
        data = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
        report = evaluate(
            model, data, {"pgd": attack}, batch_size=6, checks=False, max_forwards=limit
        )
        assert sum(made) <= limit and report.complete == (limit >= 48)

    @pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.08])
    def test_time_that_is_up_at_any_moment(self, data, seconds):
        weight = torch.randn(144, 4, dtype=torch.float64)

        def slow(x):
            time.sleep(0.01)
            return x.flatten(1) @ weight

        labels = slow(data[0]).argmax(1)
        report = evaluate(
            slow,
            (data[0], labels),
            {"pgd": PGD(slow, 0.1)},
            batch_size=20,
            checks=False,
            max_seconds=seconds,
        )
        assert not report.complete and report.unread == 120 - len(report.clean_correct)

    def test_every_pass_is_reported_when_it_ends(self, model, data):
        made = []
        handle = model.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
        report = evaluate(
            model,
            data,
            {"pgd": PGD(model, EPS, steps=30)},
            max_forwards=360,
            batch_size=40,
            checks=False,
        )
        handle.remove()
        assert report.attacks["pgd"].forwards == sum(made) <= 360

    def test_checks_are_paid_from_it(self, model, data):
        made = []
        handle = model.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
        for limit in (100, 1500):
            made.clear()
            report = evaluate(
                model, data, {"pgd": PGD(model, EPS, steps=30)}, max_forwards=limit, batch_size=40
            )
            looked = {flag.name: flag.looked_at for flag in report.checks}
            assert sum(made) <= limit and looked["batch dependence"] == (limit > 100)
        handle.remove()

    @pytest.mark.parametrize(
        "make",
        [
            lambda m, **o: Square(m, 0.05, steps=40, eot=3, **o),
            lambda m, **o: PGD(m, EPS, eot=3, **o),
        ],
    )
    def test_the_mean_of_several_answers_costs_several_passes(self, model, data, make):
        made = []
        handle = model.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
        for limit in (300, 2000, None):
            made.clear()
            report = evaluate(
                model, data, {"a": make(model)}, max_forwards=limit, batch_size=40, checks=False
            )
            assert limit is None or sum(made) <= limit
        handle.remove()
        assert report.complete and report.attacks["a"].forwards == sum(made)

    def test_a_routing_mode_that_records_uses_it_up(self, model, data):
        """A look at the clean images for each attempt is paid when it is made, no earlier."""
        attack, used = {"pgd": PGD(model, EPS, steps=5, routing=FrozenRouting())}, []
        handle = model.register_forward_pre_hook(lambda module, args: used.append(len(args[0])))
        free = evaluate(model, data, attack, batch_size=40, checks=False)
        needed = sum(used)
        for limit in (*range(41, 300, 20), needed // 2, needed + 40):
            used.clear()
            report = evaluate(model, data, attack, batch_size=40, checks=False, max_forwards=limit)
            assert sum(used) <= limit and sum(used) > limit - 200
        handle.remove()
        assert report.complete and torch.equal(report.attacks["pgd"].fell, free.attacks["pgd"].fell)

    def test_enough_changes_nothing(self, model, data):
        attack = PGD(model, EPS, steps=5)
        free = evaluate(model, data, {"pgd": attack}, checks=False)
        enough = evaluate(
            model, data, {"pgd": attack}, checks=False, max_forwards=10**6, max_seconds=1000
        )
        assert (
            free.complete
            and enough.complete
            and torch.equal(free.attacks["pgd"].fell, enough.attacks["pgd"].fell)
        )
