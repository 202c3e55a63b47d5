import pytest
import torch
import toys
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks.balls import ball as balls
from ironmoe.attacks.engine.active_batch import ActiveBatch, blank_attempts
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.random import example_keys

NORMS = sorted(balls.NORMS)
EPS = {"Linf": 0.078, "L2": 0.79, "L1": 5.1}  # half of the images fall
INF = float("inf")


class Linear(torch.nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.layer = torch.nn.Linear(dim, classes, bias=False)
        torch.nn.init.normal_(self.layer.weight)

    def forward(self, x):
        return self.layer(x.flatten(1) - 0.5)

    def least_distance(self, x, labels, norm, bounds):
        """(N,) float64, to the nearest other class inside the box."""
        weight, flat = self.layer.weight.detach().double(), x.flatten(1).double()
        distances = []
        for other in range(len(weight)):
            across = weight[other] - weight[labels]
            value = (across * (flat - 0.5)).sum(1)
            kind = balls.ball_of(norm)
            point = flat + kind.step_to_hyperplane(flat, across, value, bounds)
            reached = (labels != other) & ((across * (point - 0.5)).sum(1) > -1e-9)
            ball = kind(flat, torch.zeros(len(flat), dtype=torch.float64), bounds)
            distances.append(torch.where(reached, ball.distance(point), INF))
        return torch.stack(distances).amin(0)


def close(one, other):
    """The same but for rounding: products of differently shaped batches differ in the last bits."""
    torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=1e-9)
    assert torch.equal(one.success, other.success)


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(40)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 4])
def test_least_distance_to_linear_classes_in_a_box(norm, classes):
    model, x = Linear(30, classes), torch.rand(12, 2, 3, 5)
    labels = model(x).argmax(1)
    best = model.least_distance(x, labels, norm, (0.0, 1.0))
    unboxed = model.least_distance(x, labels, norm, (-1e6, 1e6))
    assert (best > 1.005 * unboxed).any()  # or the box would not matter
    for eta, slack in ((1.0005, 1e-3), (1.05, 1e-2)):
        result = FAB(model, INF, steps=20, targets=0, eta=eta, norm=norm, early_stop=False).run(
            x, labels
        )
        ratio = result.distance / best
        assert result.success.all() and ratio.min() >= 1 - 1e-5 and ratio.max() <= 1 + slack


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 9])
def test_an_image_falls_exactly_if_a_boundary_is_within_eps(norm, targets):
    model, x = Linear(30, 4), torch.rand(40, 30)
    labels = model(x).argmax(1)
    best = model.least_distance(x, labels, norm, (0.0, 1.0))
    eps = best.median()
    result = FAB(model, eps, steps=20, targets=targets, norm=norm).run(x, labels)
    sure = (best / eps - 1).abs() > 0.01
    assert torch.equal(result.success[sure], (best < eps)[sure]) and sure.sum() > 30
    assert (result.distance <= eps).all()


def test_one_target_of_two_classes_is_all_classes(data):
    images, labels = data[0], data[1] % 2
    model = toys.mlp(images.float(), labels)
    one, every = (
        FAB(model, 0.8, steps=8, targets=targets, norm="L2")(images, labels) for targets in (1, 0)
    )
    assert torch.equal(one, every) and not torch.equal(one, images)


@pytest.mark.parametrize("targets", [0, 1])
@pytest.mark.parametrize("early_stop", [True, False])
def test_passes_are_saved_and_change_nothing(model, data, targets, early_stop, monkeypatch):
    monkeypatch.setattr("ironmoe.attacks.engine.rounds.SPLIT_FROM", 1)

    class Wasteful(FAB):
        def wants_gradient(self, attempts):
            return None

    images, labels = data
    options = {"steps": 12, "targets": targets, "norm": "L2", "early_stop": early_stop}
    frugal, plain = (
        kind(model, EPS["L2"], **options).run(images, labels) for kind in (FAB, Wasteful)
    )
    close(frugal, plain)
    assert frugal.success.any()
    assert (frugal.backwards <= plain.backwards).all()
    if not early_stop:
        # one for each step and class; here all checks but the first turn out as expected
        needed = 12 * (1 if targets else 3)
        assert (frugal.backwards <= needed + 1).float().mean() > 0.9 and (
            plain.backwards >= needed + 11
        ).float().mean() > 0.9


class Rounded(torch.nn.Module):
    """A boundary with bumps of one pixel's size: a misclassified iterate is often followed by one
    that is not."""

    def forward(self, x):
        score = x.flatten(1).sum(1) - 2.05 + 0.2 * torch.sin(40 * x.flatten(1)).sum(1)
        return torch.stack([-score, score], 1)


def test_a_check_that_fails_is_asked_again_with_gradient():
    x = 0.6 * torch.rand(30, 5, dtype=torch.float64)
    model = Rounded()
    labels = model(x).argmax(1)

    class Wasteful(FAB):
        def wants_gradient(self, attempts):
            return None

    options = {"steps": 15, "targets": 1, "norm": "L2", "early_stop": False}
    frugal, plain = (kind(model, INF, **options).run(x, labels) for kind in (FAB, Wasteful))
    close(frugal, plain)
    assert (frugal.forwards > plain.forwards).any() and (frugal.forwards >= plain.forwards).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 2])
def test_the_batch_does_not_matter(model, data, norm, targets):
    images, labels = data
    attack = FAB(model, EPS[norm], steps=6, targets=targets, norm=norm)
    whole = attack.run(images, labels)
    order = torch.randperm(len(labels))
    shuffled = attack.run(images[order], labels[order], order)
    torch.testing.assert_close(shuffled.adversarial, whole.adversarial[order], rtol=0, atol=1e-9)
    one = attack.run(images[7:8], labels[7:8], torch.tensor([7]))
    torch.testing.assert_close(one.adversarial, whole.adversarial[7:8], rtol=0, atol=1e-9)
    assert torch.equal(shuffled.steps, whole.steps[order]) and torch.equal(
        one.steps, whole.steps[7:8]
    )


@pytest.mark.parametrize("norm", NORMS)
def test_later_restarts_start_half_of_eps_away(norm):
    clean = torch.full((6, 1, 4, 4), 0.5, dtype=torch.float64)
    labels, eps = torch.zeros(6, dtype=torch.int64), torch.full((6,), 0.2, dtype=torch.float64)
    keys = example_keys(0, torch.arange(6), 0)
    attempts = blank_attempts(clean, labels, eps, labels, labels == 0, keys) | {
        "restart": torch.arange(6) % 3
    }
    attack = FAB(torch.nn.Flatten(), 0.2, restarts=3, norm=norm)
    attack.start(attempts)
    distance = attack.ball(attempts).distance(attempts["point"])
    torch.testing.assert_close(distance, torch.tensor([0.0, 0.1, 0.1] * 2, dtype=torch.float64))
    assert not torch.equal(attempts["point"][1], attempts["point"][2])


class Kinked(torch.nn.Module):
    """z₁ − z₀ bends so that the first step, overshot by a quarter, lands on the boundary itself: a
    tie, which class 0 wins."""

    def forward(self, x):
        pixel = x.flatten(1)[:, 0]
        return torch.stack(
            [torch.zeros_like(pixel), torch.minimum(pixel - 0.5, (pixel - 0.625) / 2)], 1
        )


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_gets_stuck_on_the_boundary(norm):
    result = FAB(Kinked(), 0.7, steps=5, targets=1, eta=1.25, norm=norm).run(
        torch.zeros(1, 2), torch.tensor([0])
    )
    assert result.success.all() and result.distance < 0.63


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_constant_model_has_no_boundary(norm, early_stop):
    images = torch.rand(3, 1, 4, 4)
    attack = FAB(
        lambda x: 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 2, 3]),
        0.1,
        4,
        norm=norm,
        early_stop=early_stop,
    )
    result = attack.run(images, torch.full((3,), 2))
    assert (
        not result.success.any()
        and torch.equal(result.adversarial, images)
        and result.flags["zero_gradient"].all()
    )


@pytest.mark.parametrize("norm", NORMS)
def test_without_radius_or_steps_nothing_falls(model, data, norm):
    for attack in (FAB(model, 0.0, steps=3, norm=norm), FAB(model, EPS[norm], steps=0, norm=norm)):
        result = attack.run(*data)
        assert torch.equal(result.adversarial, data[0]) and not result.success.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_going_on_finds_nearer_points(data, dtype):
    images, labels = data[0].to(dtype), data[1]
    model = toys.mlp(data[0].float(), labels).to(dtype)
    first, best = (
        FAB(model, INF, steps=25, targets=1, norm="L2", early_stop=stop).run(images, labels)
        for stop in (True, False)
    )
    assert first.adversarial.dtype == best.adversarial.dtype == dtype
    assert (
        best.success.all()
        and (best.distance <= first.distance).all()
        and best.distance.mean() < 0.99 * first.distance.mean()
    )
    assert (first.forwards < 10).all() and (best.forwards >= 25).all()


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("targets", [0, 2])
def test_nothing_waits_for_the_device(early_stop, targets):
    """On fake tensors whatever needs a value, .item() or a nonzero, raises."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = ActiveBatch(
            FAB(model, 0.1, 2, targets=targets, early_stop=early_stop), 4, 1, fixed=True
        )
        labels = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        eps = mode.from_tensor(torch.full((4,), 0.1, dtype=torch.float64))
        images = mode.from_tensor(torch.rand(4, 1, 2, 4))
        attempts = blank_attempts(
            images, labels, eps, labels, labels == 0, example_keys(0, labels, 0)
        )
        batch.attack.start(attempts)
        batch.attempts, batch.owners = attempts, [None] * 4
        for _ in range(3):
            batch.round()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1}, {"restarts": 0}, {"targets": -1}, {"alpha_max": 1.5}, {"eta": 0.9},
        {"beta": 0.0}, {"beta": 1.1},
        {"targeted": True}, {"eps": INF, "restarts": 2}, {"eps": -1.0}, {"norm": "L3"},
    ],
)  # fmt: skip
def test_errors_name_the_argument(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FAB(torch.nn.Flatten(), **options)


@pytest.mark.parametrize("norm", NORMS)
def test_all_targets_are_tried_for_the_least_distance(norm):
    model, x = Linear(30, 4), torch.rand(12, 30)
    labels = model(x).argmax(1)
    best = model.least_distance(x, labels, norm, (0.0, 1.0))
    result = FAB(model, INF, steps=12, eta=1.0005, norm=norm, early_stop=False).run(x, labels)
    assert result.success.all() and (result.distance <= best * (1 + 1e-3)).all()
    first = FAB(model, INF, steps=12, targets=1, eta=1.0005, norm=norm, early_stop=False).run(
        x, labels
    )
    assert (first.distance > 1.05 * best).any()  # or one target would have been enough


def test_restarts_only_help():
    model, x = Rounded(), 0.6 * torch.rand(30, 5, dtype=torch.float64)
    labels = model(x).argmax(1)
    options = {"steps": 10, "targets": 1, "norm": "L2"}
    few, many = (
        FAB(model, 0.2, restarts=n, early_stop=False, **options).run(x, labels) for n in (1, 3)
    )
    ratio = (many.distance / few.distance)[few.success]
    assert many.success[few.success].all() and ratio.max() <= 1 + 1e-9 and ratio.min() < 0.99
    eps = few.distance[few.success].median()
    once, often = (FAB(model, eps, restarts=n, **options).run(x, labels) for n in (1, 3))
    assert often.success[once.success].all()
    # the first start is the same
    torch.testing.assert_close(often.adversarial[once.success], once.adversarial[once.success])
