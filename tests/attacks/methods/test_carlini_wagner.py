import math

import pytest
import torch
import toys
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks import PGD, RoutingDivergence, evaluate
from ironmoe.attacks.engine.active_batch import ActiveBatch, blank_attempts
from ironmoe.attacks.losses import margin
from ironmoe.attacks.methods import carlini_wagner
from ironmoe.attacks.methods.carlini_wagner import CW
from ironmoe.attacks.random import example_keys


class Linear(torch.nn.Module):
    """Logits (−s, s), s = w·x − bias."""

    def __init__(self, dim):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, dtype=torch.float64))
        self.bias = 0.0

    def forward(self, x):
        score = x.flatten(1) @ self.weight.to(x.dtype) - self.bias
        return torch.stack([-score, score], 1)


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(24, size=6, noise=0.25)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


def walk(attack, images, labels, rounds):
    """The rows before each of the first answers."""
    eps = torch.full(labels.shape, math.inf, dtype=torch.float64)
    attempts = blank_attempts(images, labels, eps, labels, labels >= 0, example_keys(0, labels, 0))
    attack.start(attempts)
    attack.attacked_model.image_dtype = images.dtype
    for _ in range(rounds):
        yield dict(attempts)
        answer = attack.ask(attempts, True)
        attempts["queries"] = attempts["queries"] + 1
        attack.advance(attempts, *answer[:3])


def least_distance(weight, score, x, bounds):
    """(N,) of the nearest point of the box with w·(z − x) = −score: |z − x| = min(λ|w|, room), λ by
    bisection."""
    down = -torch.sign(score)[:, None] * weight
    room = torch.where(down > 0, bounds[1] - x, x - bounds[0])
    low, high = (
        torch.zeros(len(x), dtype=torch.float64),
        torch.full((len(x),), 1e6, dtype=torch.float64),
    )
    for _ in range(100):
        middle = (low + high) / 2
        short = (torch.minimum(middle[:, None] * weight.abs(), room) * weight.abs()).sum(
            1
        ) < score.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.minimum(high[:, None] * weight.abs(), room).norm(dim=1)


@pytest.mark.parametrize(
    "bounds, dtype", [((0.0, 1.0), torch.float64), ((-3.0, 5.0), torch.float32)]
)
def test_finds_the_nearest_point_of_a_linear_model(dtype, bounds):
    low, high = bounds
    model, x = Linear(12), low + (high - low) * (0.03 + 0.94 * torch.rand(4, 3, 2, 2, dtype=dtype))
    flat = x.flatten(1).double()
    weight = model.weight.detach()
    model.bias = float((flat @ weight).max()) + 0.5 * (high - low)
    score = flat @ weight - model.bias
    expected = least_distance(weight, score, flat, bounds)
    # the box matters
    assert ((expected - score.abs() / weight.norm()).abs() > 1e-3 * expected).any()
    attack = CW(model, c=0.1, steps=120, search_steps=6, bounds=bounds)
    result = attack.run(x, torch.zeros(4, dtype=torch.int64))
    assert result.success.all()
    ratio = result.distance / expected
    assert (ratio >= 1 - 1e-6).all() and (ratio <= 1.02).all(), ratio
    assert result.adversarial.min() >= low and result.adversarial.max() <= high


def test_images_on_the_faces_of_the_box_still_move():
    model, x = Linear(6), torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.5, 0.5]]).double()
    model.weight.data = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.1, 0.1]).double()
    model.bias = float(x @ model.weight.detach()) + 0.5
    result = CW(model, c=1.0, steps=200, lr=0.05, search_steps=3).run(
        x, torch.zeros(1, dtype=torch.int64)
    )
    expected = least_distance(model.weight.detach(), torch.tensor([-0.5]).double(), x, (0.0, 1.0))
    assert result.success.all() and (result.distance <= 1.05 * expected).all()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 2.0)])
def test_each_row_walks_as_torchs_adam_does(data, model, bounds, monkeypatch):
    monkeypatch.setattr(carlini_wagner, "CHECKS", 1)
    (images, labels), (low, high) = (data[0][:3], data[1][:3]), bounds
    images = low + (high - low) * images
    attack = CW(
        lambda x: model((x - low) / (high - low)),
        c=2.0,
        confidence=0.3,
        steps=40,
        lr=0.02,
        search_steps=1,
        bounds=bounds,
    )
    mine = [attempts["point"] for attempts in walk(attack, images, labels, 40)]
    w = torch.atanh(((2 * images - low - high) / (high - low)) * (1 - 1e-6)).requires_grad_()
    adam = torch.optim.Adam([w], lr=0.02)
    for point in mine:
        image = (low + high) / 2 + (high - low) / 2 * w.tanh()
        torch.testing.assert_close(point, image.detach(), rtol=0, atol=1e-8)
        change = ((image - images) / (high - low)).square().sum()
        lack = (0.3 - margin(model((image - low) / (high - low)), labels)).clamp_min(0).sum()
        adam.zero_grad()
        (change + 2.0 * lack).backward()
        adam.step()


def test_the_search_for_c():
    """The first of two images needs a c between 2 and 3; the second cannot be fooled."""

    class Wall(torch.nn.Module):
        def forward(self, x):
            # falls by 2c · gain while the distance asks for less than that
            gain = 2 * x.flatten(1).sum(1)
            return torch.stack(
                [torch.zeros_like(gain), gain - torch.where(x.flatten(1)[:, 1] > 0.5, 1e3, 1.3)], 1
            )

    images, labels = (
        torch.tensor([[0.5, 0.1], [0.5, 0.9]]).double(),
        torch.zeros(2, dtype=torch.int64),
    )
    attack = CW(Wall(), c=1e-3, steps=60, lr=0.05, search_steps=8)
    values = [[], []]
    for attempts in walk(attack, images, labels, attack.max_queries):
        for row in (0, 1):
            if attempts["search"][row] == len(values[row]) < 8:
                values[row].append(float(attempts["c"][row]))
    assert values[1] == pytest.approx([1e-3 * 10**k for k in range(8)])
    failed, reached = 0.0, math.inf
    for c, then in zip(values[0], values[0][1:], strict=False):
        if then > c and math.isinf(reached):
            assert then == pytest.approx(10 * c)
            failed = c
        elif then > c:
            failed = c
        else:
            reached = c
        if not math.isinf(reached):
            assert then == pytest.approx((failed + reached) / 2)
    assert reached < math.inf and failed > 0


def test_a_search_step_ends_when_nothing_improves():
    def constant(x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2) + 0 * x.sum()

    result = CW(constant, steps=100, search_steps=4).run(
        torch.rand(2, 5), torch.zeros(2, dtype=torch.int64)
    )
    assert (
        not result.success.any()
        and result.adversarial.isfinite().all()
        and result.flags["zero_gradient"].all()
    )
    assert (result.forwards <= 4 * 11 + 3).all()  # checks after 10 steps instead of 100


def test_confidence_is_reached_and_costs_distance(data, model):
    plain, sure = (
        CW(model, c=1.0, confidence=k, steps=50, search_steps=3, lr=0.03).run(*data)
        for k in (0.0, 1.0)
    )
    both = plain.success & sure.success
    assert both.sum() > 12
    reached = margin(model(sure.adversarial), data[1])
    assert (reached[both] >= 1 - 1e-9).all() and (
        margin(model(plain.adversarial), data[1])[both] < 0.5
    ).any()
    assert (sure.distance[both] > plain.distance[both]).all()


def test_a_confidence_out_of_reach_leaves_the_surest_point():
    model, x = Linear(4), torch.full((1, 4), 0.5).double()
    model.weight.data = torch.ones(4).double()
    model.bias = 2.5
    result = CW(model, c=1.0, confidence=100.0, steps=200, search_steps=3, lr=0.1).run(
        x, torch.zeros(1, dtype=torch.int64)
    )
    # of at most 3
    assert (
        result.success.all()
        and margin(model(result.adversarial), torch.zeros(1, dtype=torch.int64)) > 2.5
    )


def test_early_stop_is_a_test_of_eps(data, model):
    options = {"eps": 0.45, "c": 1.0, "steps": 60, "search_steps": 2}
    nearest, first = (CW(model, early_stop=early, **options).run(*data) for early in (False, True))
    assert (first.success <= nearest.success).all() and 3 < first.success.sum() < 20
    assert first.forwards.sum() < nearest.forwards.sum()
    assert (first.distance[first.success] <= 0.45).all()
    assert (nearest.distance < first.distance)[first.success].any() and (
        nearest.distance <= first.distance
    )[first.success].all()


def test_distances_are_those_at_which_gradients_begin_to_succeed(data, model):
    result = CW(model, c=1.0, steps=60, search_steps=4).run(*data)
    assert result.success.all()
    beyond, short = (
        PGD(model, result.distance * factor, steps=30, norm="L2", loss="margin").run(*data).success
        for factor in (1.1, 0.9)
    )
    assert beyond.double().mean() > 0.75 and short.double().mean() < 0.1


@pytest.fixture(scope="module")
def routed():
    """A V-MoE, and images and labels it was fitted to."""
    images, labels = toys.blobs(24, noise=0.25)
    return toys.vmoe(images, labels, moe_layers=(0, 1)), images[:8].double(), labels[:8]


VANISHING = {"c": 0.1, "steps": 30, "lr": 0.05, "search_steps": 4}


@pytest.fixture(scope="module")
def unsteered(routed):
    model, images, labels = routed
    return CW(model, **VANISHING).run(images, labels)


@pytest.mark.parametrize(
    "mode",
    [RoutingDivergence(1e-9, "weakest"), RoutingDivergence(1e-9, 2), RoutingDivergence(-1e-9)],
)
def test_a_vanishing_term_changes_no_distance(routed, unsteered, mode):
    """Logarithms of probabilities are below 0, divergences above it: by a hair, any of them would
    move a clamped margin off κ."""
    model, images, labels = routed
    steered = CW(model, routing=mode, **VANISHING).run(images, labels)
    assert unsteered.success.all() and torch.equal(steered.success, unsteered.success)
    torch.testing.assert_close(steered.distance, unsteered.distance, rtol=1e-4, atol=0)


def test_a_term_does_not_stand_in_for_confidence(routed):
    model, images, labels = routed
    options = {"c": 0.1, "confidence": 1.0, "steps": 40, "lr": 0.05, "search_steps": 4}
    for weight in (-5.0, 5.0):
        result = CW(model, routing=RoutingDivergence(weight), **options).run(images, labels)
        reached = margin(model(result.adversarial), labels)
        assert result.success.all() and (reached >= 1 - 1e-9).all()


def test_results_do_not_depend_on_the_batch(data, model):
    images, labels = data[0][:7], data[1][:7]
    attack = CW(model, c=1.0, steps=20, search_steps=2)
    whole, order = attack.run(images, labels), torch.randperm(7)
    permuted = attack.run(images[order], labels[order], order)
    alone = attack.run(images[5:6], labels[5:6])
    queued = evaluate(
        model, (images, labels), {"cw": attack}, batch_size=3, keep_adversarial=True
    ).attacks["cw"]
    assert whole.forwards.min() < whole.forwards.max() and whole.success.any()
    for other, place in (
        (permuted.adversarial, order),
        (alone.adversarial, [5]),
        (queued.adversarial, slice(None)),
    ):
        torch.testing.assert_close(
            other.to(images.dtype), whole.adversarial[place], rtol=0, atol=1e-6
        )


def test_targeted(data, model):
    targets = (data[1] + 1) % 4
    result = CW(model, c=1.0, steps=50, search_steps=3, lr=0.03, targeted=True).run(
        data[0], targets
    )
    assert result.success.sum() > 12
    assert (model(result.adversarial[result.success]).argmax(1) == targets[result.success]).all()


def test_eps_of_zero_and_single_answers(data, model):
    images, labels = data[0][:1], data[1][:1]
    for options in ({}, {"early_stop": True}):
        result = CW(model, 0.0, steps=5, search_steps=2, **options).run(images, labels)
        assert not result.success.any() and result.robust.all()
        assert (
            CW(model, steps=1, search_steps=1, **options)
            .run(images, labels)
            .adversarial.isfinite()
            .all()
        )


@pytest.mark.parametrize("early_stop", [False, True])
def test_the_device_is_never_waited_for(early_stop):
    """Fake tensors have no values: whatever looked at one would raise."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = ActiveBatch(CW(model, 0.1, steps=3, early_stop=early_stop), 4, 1, fixed=True)
        labels = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        eps = mode.from_tensor(torch.full((4,), 0.1, dtype=torch.float64))
        images = mode.from_tensor(torch.rand(4, 1, 2, 4))
        attempts = blank_attempts(
            images, labels, eps, labels, labels == 0, example_keys(0, labels, 0)
        )
        batch.attack.start(attempts)
        batch.attempts, batch.owners = attempts, [None] * 4
        shapes = {name: (value.shape, value.dtype) for name, value in attempts.items()}
        for _ in range(3):
            batch.round()
        assert {
            name: (value.shape, value.dtype) for name, value in batch.attempts.items()
        } == shapes


@pytest.mark.parametrize(
    "options",
    [
        {"c": 0.0},
        {"c": math.inf},
        {"lr": -1.0},
        {"steps": 0},
        {"search_steps": 0},
        {"confidence": -1.0},
        {"norm": "Linf"},
        {"eps": -1.0},
    ],
)
def test_errors_name_the_argument(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CW(torch.nn.Flatten(), **options)
