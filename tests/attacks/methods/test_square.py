import math
from itertools import pairwise

import pytest
import torch
import toys
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks import PGD, AutoAttack, evaluate
from ironmoe.attacks.engine.active_batch import ActiveBatch, blank_attempts
from ironmoe.attacks.methods import square
from ironmoe.attacks.methods.parts import square_proposals
from ironmoe.attacks.methods.parts.square_windows import (
    Window,
    counted,
    covered,
    draw_windows,
    share_of_image,
    two_bumps,
)
from ironmoe.attacks.methods.square import Square
from ironmoe.attacks.random import example_keys

NORMS = ["Linf", "L2", "L1"]
EPS = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}  # at which gradients break most of the images


class Linear(torch.nn.Module):
    """Logits (−s, s), s = w·x − bias: no attack of the tests turns the sign of s."""

    def __init__(self, dim, bias=100.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, dtype=torch.float64))
        self.bias = bias

    def forward(self, x):
        score = x.flatten(1) @ self.weight.to(x.dtype) - self.bias
        return torch.stack([-score, score], 1)


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(40, size=6, noise=0.25)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


def rows_of(attack, images, labels, eps):
    eps = torch.full(labels.shape, eps, dtype=torch.float64)
    attempts = blank_attempts(
        images,
        labels,
        eps,
        labels,
        labels >= 0,
        example_keys(attack.seed, torch.arange(len(labels)), 0),
    )
    attack.start(attempts)
    return attempts


def walk(attack, images, labels, eps):
    """The rows after each answer; row 0 decides when it is over."""
    attempts = rows_of(attack, images, labels, eps)
    while not attempts["finished"][0]:
        answer = attack.attacked_model.ask(attempts, attack.objective, False)
        attempts["asked"] = attempts["point"]
        attempts["queries"] = attempts["queries"] + 1
        attack.advance(attempts, *answer[:3])
        yield dict(attempts)


def test_the_schedule_halves_the_share():
    step = torch.tensor(
        [
            0,
            10,
            11,
            50,
            51,
            200,
            201,
            500,
            501,
            1000,
            1001,
            2000,
            2001,
            4000,
            4001,
            6000,
            6001,
            8000,
            8001,
        ]
    )
    expected = [0.8 / 2 ** (k // 2) for k in range(19)]
    assert share_of_image(step, 0.8).tolist() == expected


@pytest.mark.parametrize("plane", [(7, 7), (28, 28), (5, 12), (1, 40), (2, 2)])
@pytest.mark.parametrize("odd", [False, True])
def test_windows_cover_their_share_and_all_places(plane, odd):
    share = torch.tensor([0.8, 0.4, 0.1, 0.01]).double().repeat(4000)
    windows = draw_windows(torch.rand(16000, 2), share, plane, odd)
    assert all((start >= 0).all() for start in windows[:2])
    for size, start, length in zip(plane, windows[:2], windows[2:], strict=True):
        assert (
            (start + length <= size).all()
            and bool((start == 0).any())
            and bool((start + length == size).any())
        )
    area = (windows.height * windows.width).view(-1, 4)[0]
    if not odd and plane[0] == plane[1]:
        side = [max(1, round(math.sqrt(s * plane[0] * plane[1]))) for s in share[:4].tolist()]
        assert area.tolist() == [s * s for s in side]
    elif not odd:
        wanted = share[:4] * plane[0] * plane[1]
        assert ((area - wanted).abs() <= 0.5 * (windows.height + windows.width)[:4] + 1).all()
    else:
        assert ((windows.height % 2 == 1) | (windows.height == plane[0]))[
            windows.height == windows.width
        ].all()
        assert (windows.height >= min(3, plane[0])).all() and (
            windows.width >= min(3, plane[1])
        ).all()


def test_covered_and_counted_are_slices():
    windows = draw_windows(torch.rand(6, 4, 2), torch.rand(6, 4).double(), (9, 11), odd=False)
    pixels = torch.rand(6, 3, 9, 11) < 0.5
    inside, counts = covered(windows, (9, 11)), counted(pixels, windows)
    for row in range(6):
        for k in range(4):
            top, left, height, width = (int(field[row, k]) for field in windows)
            expected = torch.zeros(9, 11, dtype=torch.bool)
            expected[top : top + height, left : left + width] = True
            assert torch.equal(inside[row, k], expected)
            assert torch.equal(counts[row, k], pixels[row, :, expected].sum(1).int())


def bump(height, width, power):
    """Rings around the centre, added up one by one."""
    rings = torch.zeros(height, width, dtype=torch.float64)
    for reach in range(max(height // 2, width // 2) + 1):
        for i in range(height):
            for j in range(width):
                if max(abs(i - height // 2), abs(j - width // 2)) <= reach:
                    rings[i, j] += 1 / (reach + 1) ** power
    return rings


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (9, 9), (1, 6), (3, 8)])
def test_two_bumps_are_those_of_the_paper(order, size):
    height, width = size
    window = Window(*(torch.tensor([value, value]) for value in (2, 1, height, width)))
    upright, lying = two_bumps(window, torch.tensor([False, True]), (12, 10), order, torch.float64)
    for pattern, (down, across) in ((upright, (height, width)), (lying.T, (width, height))):
        halves = [bump(part, across, 4 // order) for part in (down // 2, down - down // 2) if part]
        halves = [half / half.norm(p=order) for half in halves]
        expected = torch.cat([halves[0], -halves[1]] if len(halves) == 2 else [-halves[0]])
        expected = expected / expected.norm(p=order)
        place = (2, 1) if pattern is upright else (1, 2)
        cut = pattern[place[0] : place[0] + down, place[1] : place[1] + across]
        torch.testing.assert_close(cut, expected, rtol=0, atol=1e-12)
        # nothing outside
        torch.testing.assert_close(pattern.norm(p=order), torch.tensor(1.0).double())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-100.0, 100.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_stay_inside_and_the_margin_never_falls(norm, bounds, dtype):
    images, labels, eps = (
        torch.rand(5, 2, 7, 7, dtype=dtype),
        torch.tensor([0, 0, 0, 0, 0]),
        EPS[norm],
    )
    attack = Square(Linear(98), steps=30, norm=norm, bounds=bounds)
    steps = list(walk(attack, images, labels, eps))
    before = torch.full((5,), -math.inf).double()
    ball = attack.ball(steps[0])
    for attempts in steps:
        distance = ball.distance(attempts["asked"])
        assert attempts["asked"].min() >= bounds[0] and attempts["asked"].max() <= bounds[1]
        assert (distance <= eps * (1 + 1e-6)).all() and (attempts["best_margin"] >= before).all()
        if norm == "Linf":
            assert (
                (attempts["asked"] == attempts["low"]) | (attempts["asked"] == attempts["high"])
            ).all()
        if norm == "L2" and bounds[0] < 0:
            assert (distance >= eps * (1 - 1e-6)).all()
        before = attempts["best_margin"]
    margins = attack.loss(
        attack.attacked_model.ask(
            attempts | {"point": attempts["best"]}, attack.objective, False
        ).logits,
        attempts,
    )
    assert torch.equal(margins.double(), before) and torch.equal(
        attempts["point"][0], attempts["best"][0]
    )
    assert (before > steps[0]["best_margin"]).all()


def test_linf_finds_the_optimum_of_a_linear_model():
    """Windows of one pixel set one sign each, so coordinate ascent arrives."""
    model, images = Linear(16), torch.rand(6, 1, 4, 4, dtype=torch.float64)
    result = Square(model, 0.3, 500, 0.1).run(images, torch.zeros(6, dtype=torch.int64))
    weight = model.weight.detach()
    room = torch.where(weight > 0, 1 - images.flatten(1), images.flatten(1)).clamp_max(0.3)
    gain = (result.adversarial - images).flatten(1) @ weight
    torch.testing.assert_close(gain, (room * weight.abs()).sum(1))


@pytest.mark.parametrize("norm, share", [("L2", 0.3), ("L1", 0.4)])
def test_l2_and_l1_come_towards_the_optimum_of_a_linear_model(norm, share):
    model, images = Linear(36), 0.3 + 0.4 * torch.rand(6, 1, 6, 6, dtype=torch.float64)
    eps = 0.2
    result = Square(model, eps, 150, 0.1, norm=norm).run(images, torch.zeros(6, dtype=torch.int64))
    weight = model.weight.detach()
    best = eps * (weight.norm() if norm == "L2" else weight.abs().max())
    ratio = (result.adversarial - images).flatten(1) @ weight / best
    assert (ratio <= 1 + 1e-6).all() and (ratio >= share).all()


def test_proposals_that_change_nothing_are_steps_but_no_questions(monkeypatch):
    model, images, labels = Linear(16), torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    monkeypatch.setitem(square.ROWS_AT_LEAST, "cpu", 1)
    attack = Square(model, 0.1, 80, 0.1)
    skipping = attack.run(images, labels)
    few = list(walk(attack, images[:1], labels[:1], 0.1))
    monkeypatch.setattr(square_proposals, "DRAWS", 1)
    plain = attack.run(images, labels)
    every = list(walk(attack, images[:1], labels[:1], 0.1))
    assert torch.equal(skipping.adversarial, plain.adversarial)
    assert (plain.forwards >= 81).all()
    # windows of one pixel, in one channel
    assert skipping.forwards.sum() < 0.6 * plain.forwards.sum()
    # What is asked is what the plain search asks, without the repetitions.
    changed, useful = (
        [
            attempts["asked"]
            for before, attempts in pairwise(walked)
            if not torch.equal(attempts["asked"], before["best"])
        ]
        for walked in (every, few)
    )
    assert len(changed) == len(useful) and all(map(torch.equal, changed, useful))


@pytest.mark.parametrize("norm, share", [("Linf", 0.8), ("L2", 0.4), ("L1", 0.5)])
def test_breaks_a_network_about_as_often_as_gradients_do(data, model, norm, share):
    eps = EPS[norm]
    by_gradient = PGD(model, eps, steps=30, norm=norm, loss="margin").run(*data).success
    by_search = Square(model, eps, 150, 0.1, norm=norm).run(*data).success
    assert by_gradient.sum() > 10
    assert share * by_gradient.sum() <= by_search.sum() <= by_gradient.sum() + 1


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_batch(data, model, norm):
    images, labels = data[0][:8], data[1][:8]
    eps = EPS[norm]
    attack = Square(model, eps, 20, 0.1, restarts=2, norm=norm, seed=3)
    whole, order = attack.run(images, labels), torch.randperm(8)
    assert 0 < whole.success.sum() < 8
    permuted = attack.run(images[order], labels[order], order)
    alone = attack.run(images[6:7], labels[6:7], torch.tensor([6]))
    queued = evaluate(
        model, (images, labels), {"square": attack}, batch_size=3, keep_adversarial=True
    ).attacks["square"]
    for other, place in (
        (permuted.adversarial, order),
        (alone.adversarial, [6]),
        (queued.adversarial, slice(None)),
    ):
        torch.testing.assert_close(
            other.to(images.dtype), whole.adversarial[place], rtol=0, atol=1e-7
        )
    assert torch.equal(queued.robust, whole.robust)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "shape", [(10,), (1,), (4, 9), (1, 3, 3), (2, 3, 5, 5), (3, 1, 1), (2, 23, 17)]
)
def test_images_of_any_shape(norm, shape):
    model, images = Linear(math.prod(shape)), torch.rand(3, *shape)
    result = Square(model, 0.1, steps=20, norm=norm).run(images, torch.zeros(3, dtype=torch.int64))
    assert result.adversarial.shape == images.shape and result.adversarial.isfinite().all()
    assert (result.distance > 0).all() and (result.distance <= 0.1).all()
    assert ((result.adversarial - images).flatten(1) @ model.weight.detach().float() > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_what_cannot_be_changed_stays(norm):
    images, labels = torch.rand(1, 1, 5, 5), torch.zeros(1, dtype=torch.int64)
    nothing = Square(Linear(25), 0.0, steps=50, norm=norm).run(images, labels)
    assert torch.equal(nothing.adversarial, images) and nothing.forwards.tolist() == [2]
    start = Square(Linear(25), 0.1, steps=0, norm=norm).run(images, labels)
    assert start.forwards.tolist() == [2] and start.distance[0] > 0

    def constant(x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    attack = Square(constant, 0.1, steps=30, norm=norm)
    result = attack.run(images, labels)
    assert result.adversarial.isfinite().all() and not result.success.any()
    torch.testing.assert_close(
        result.adversarial, rows_of(attack, images, labels, 0.1)["point"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("norm", NORMS)
def test_units_of_the_bounds_do_not_matter(data, model, norm):
    images, labels = data[0][:15], data[1][:15]
    eps = EPS[norm]
    unit = Square(model, eps, 30, 0.1, norm=norm).run(images, labels)
    wide = Square(
        lambda x: model((x + 128) / 256), 256 * eps, 30, 0.1, norm=norm, bounds=(-128, 128)
    ).run(256 * images - 128, labels)
    assert torch.equal(unit.success, wide.success) and unit.success.any()
    torch.testing.assert_close((wide.adversarial + 128) / 256, unit.adversarial, rtol=0, atol=1e-7)


def test_targeted(data, model):
    images, labels = data
    targets = (labels + 1) % 4
    result = Square(model, 0.3, 60, 0.1, targeted=True).run(images, targets)
    assert result.success.sum() > 20
    assert (model(result.adversarial[result.success]).argmax(1) == targets[result.success]).all()


def test_restarts_find_more(data, model):
    one, four = (Square(model, 0.1, 20, 0.1, restarts=r).run(*data).success for r in (1, 4))
    assert (one <= four).all() and one.sum() < four.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_the_device_is_never_waited_for(norm):
    """Fake tensors have no values: whatever looked at one would raise."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = ActiveBatch(Square(model, 0.1, 9, norm=norm), 4, 1, fixed=True)
        labels = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        eps = mode.from_tensor(torch.full((4,), 0.1, dtype=torch.float64))
        images = mode.from_tensor(torch.rand(4, 1, 6, 5))
        attempts = blank_attempts(
            images, labels, eps, labels, labels == 0, example_keys(0, labels, 0)
        )
        batch.attack.start(attempts)
        batch.attempts, batch.owners = attempts, [None] * 4
        shapes = {name: (value.shape, value.dtype) for name, value in attempts.items()}
        for _ in range(2):
            batch.round()
        assert {
            name: (value.shape, value.dtype) for name, value in batch.attempts.items()
        } == shapes


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"p_init": 0.0}, {"p_init": 1.1}, {"restarts": 0}, {"norm": "L3"}]
)
def test_errors_name_the_argument(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Square(torch.nn.Flatten(), 0.1, **options)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_asking_ahead_changes_nothing_but_the_number_of_rounds(norm, monkeypatch):
    model = toy()
    images = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    labels = model(images).argmax(1)
    attack = Square(model, {"Linf": 0.05, "L2": 0.3, "L1": 1.0}[norm], steps=150, norm=norm)
    rounds = []
    handle = model.register_forward_pre_hook(lambda module, args: rounds.append(len(args[0])))
    ahead = attack.run(images, labels)
    with_ahead = len(rounds)
    monkeypatch.setitem(square.ROWS_AT_LEAST, "cpu", 1)
    plain = attack.run(images, labels)
    handle.remove()
    torch.testing.assert_close(ahead.adversarial, plain.adversarial, rtol=0, atol=1e-12)
    assert torch.equal(ahead.success, plain.success) and torch.equal(ahead.steps, plain.steps)
    assert with_ahead < 0.6 * (len(rounds) - with_ahead)


def toy():
    torch.manual_seed(1)
    layers = torch.nn.Flatten(), torch.nn.Linear(36, 20), torch.nn.GELU(), torch.nn.Linear(20, 5)
    return torch.nn.Sequential(*layers).double()


def test_steps_that_are_set_later_count():
    """As on a stage of AutoAttack, which makes its parts itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(3, 1, 4, 4)
    attack = AutoAttack(model, eps=1e-6, version="custom", attacks_to_run=["square"])
    attack.stages[0].steps = 5
    y = model(x).argmax(1)
    plain = Square(model, eps=1e-6, steps=5).run(x, y)
    assert torch.equal(attack.run(x, y).forwards, plain.forwards)
