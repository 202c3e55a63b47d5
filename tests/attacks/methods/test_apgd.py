"""Auto-PGD: its schedule step by step, the optimum of linear models, and what each attempt owes to
itself alone."""

import pytest
import torch

from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.attacks.engine.attempts import joined, select
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.engine.job import Stage
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.methods.apgd import APGD, Halving
from ironmoe.attacks.random import example_keys

BOX = (0.0, 1.0)


class Linear(torch.nn.Module):
    """Logits W·x − b of flattened images, summed row by row: nothing depends on the batch."""

    def __init__(self, dim, classes, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, classes, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(classes, dtype=dtype))

    def forward(self, x):
        return (x.flatten(1).unsqueeze(2) * self.weight).sum(1) - self.bias


class Curved(Linear):
    def forward(self, x):
        return super().forward((3 * x).sin() + x * x.roll(1, -1))


def rows_of(model, x, eps, seed=0, target=None):
    labels = model(x).argmax(1).detach()
    false = torch.zeros(len(x), dtype=torch.bool)
    return {
        "clean": x,
        "label": labels,
        "eps": torch.full((len(x),), eps, dtype=torch.float64),
        "target": labels if target is None else target,
        "key": example_keys(seed, torch.arange(len(x)), 0),
        "clean_correct": ~false,
        "finished": false,
        "queries": torch.zeros_like(labels),
    }


def ask(attack, attempts):
    """One round, as a batch makes it."""
    answer = attack.attacked_model.ask(attempts, attack.objective)
    attempts["queries"] = attempts["queries"] + 1
    attack.advance(attempts, *answer[:3])


def checkpoints(steps, losses, rho=0.75):
    """The steps after which each row of ``losses`` (rows, steps + 1) halves; the first loss is the
    start's."""
    count = len(losses)
    zero = torch.zeros(count, dtype=torch.int64)
    halving = Halving(
        steps, rho, lambda attempts: LinfBall(attempts["clean"], attempts["eps"], BOX)
    )
    attempts = {
        "clean": torch.rand(count, 2), "eps": torch.ones(count, dtype=torch.float64), "key": zero,
        "label": zero,
        "finished": zero > 0, "queries": zero, "peak_loss": torch.full((count,), float("-inf")),
    }  # fmt: skip
    halving.start(attempts)
    found = [[] for _ in range(count)]
    for step, loss in enumerate(losses.T):
        attempts["peak_loss"] = attempts["peak_loss"].maximum(loss)
        before = attempts["alpha"]
        back = halving.goes_back(attempts, loss)
        assert torch.equal(attempts["alpha"], torch.where(back, before / 2, before))
        for row in back.nonzero().squeeze(1).tolist():
            found[row].append(step)
    return found


CHECKPOINTS = {
    100: [22, 41, 57, 70, 80, 87, 93, 99],
    50: [11, 21, 30, 38, 45],
    20: [4, 7, 9, *range(10, 21)],
}


@pytest.mark.parametrize("steps", CHECKPOINTS)
def test_checkpoints_are_those_of_the_paper(steps):
    # no step raised the loss
    assert checkpoints(steps, torch.zeros(1, steps + 1)) == [CHECKPOINTS[steps]]
    assert checkpoints(steps, torch.arange(steps + 1.0).unsqueeze(0)) == [[]]  # each did


def test_steps_are_halved_where_few_of_them_raised_the_loss():
    rising = torch.ones(3, 201)  # windows of 44, 38 …: 33 of 44 are three quarters
    rising[1, 1:12] = -1
    rising[2, 1:11] = -1
    rising[:, 45:] = 1
    first = [found[:1] for found in checkpoints(200, rising.cumsum(1))]
    assert first == [[], [44], []]


def test_steps_are_halved_where_the_best_loss_did_not_rise():
    """At 41, as 22 cannot be by this rule, and not at 57, right after a halving, but at 70, and so
    on."""
    losses = torch.arange(101.0)
    losses[0] = 1e3
    assert checkpoints(100, losses.unsqueeze(0)) == [[41, 70, 87, 99]]


def test_a_return_starts_from_the_best_point():
    """A loss that falls with every step: the point after a checkpoint is a step of the new length
    from the start."""
    model = Linear(6, 2)
    attack = APGD(model, 0.2, steps=50, loss=lambda logits, labels: logits[:, 0] * 0)
    x = torch.full((1, 6), 0.5)
    attempts = rows_of(model, x, 0.2)
    attack.start(attempts)
    start, grad = attempts["point"], torch.ones(1, 6)
    for step in range(12):
        attempts["queries"] = attempts["queries"] + 1
        before = attempts["before"]
        attack.advance(
            attempts, torch.zeros(1, 2), torch.tensor([-float(step)]), grad if step == 0 else -grad
        )
    assert attempts["alpha"].item() == pytest.approx(0.2)
    ahead = (start + 0.2 * grad).clamp(0.3, 0.7)
    expected = (start + 0.75 * (ahead - start) + 0.25 * (start - before)).clamp(0.3, 0.7)
    torch.testing.assert_close(attempts["point"], expected)


def optimum(weight, x, eps, norm):
    """max w·d over ball and box for each row of ``weight`` (B, d), in float64."""
    weight, x = weight.double(), x.double()
    room, size = torch.where(weight > 0, 1 - x, x), weight.abs()
    if norm == "Linf":
        return (size * room.clamp_max(eps)).sum(1)
    if norm == "L1":
        order = size.argsort(1, descending=True)
        room, size = room.gather(1, order), size.gather(1, order)
        return (size * (eps - room.cumsum(1) + room).clamp_min(0).minimum(room)).sum(1)
    low, high = (
        torch.zeros(len(x), 1, dtype=torch.float64),
        torch.full((len(x), 1), 1e9, dtype=torch.float64),
    )
    for _ in range(100):
        middle = (low + high) / 2
        within = (middle * size).minimum(room).norm(dim=1, keepdim=True) <= eps
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return (size * (low * size).minimum(room)).sum(1)


@pytest.mark.parametrize(
    "norm, eps, least, options",
    [
        ("Linf", 0.05, 1 - 1e-6, {}),
        ("L2", 0.4, 0.99, {}),
        ("L1", 1.5, 0.985, {}),
        ("L1", 1.5, 0.97, {"three_radii": True}),
    ],
)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_optimum_of_a_linear_model_is_reached(norm, eps, least, options, loss):
    torch.manual_seed(0)
    model, x = Linear(60, 2), torch.rand(20, 60)
    slope = (model.weight[:, 1] - model.weight[:, 0]).detach()
    model.bias.data[1] = (x @ slope).min() + 1e-3  # near one class, far from the other
    labels = model(x).argmax(1)
    result = APGD(model, eps, norm=norm, loss=loss, early_stop=False, **options).run(x, labels)
    away = torch.where(labels == 1, -1, 1)[:, None] * slope
    gain = (away.double() * (result.adversarial.double() - x.double())).sum(1)
    best = optimum(away, x, eps, norm)
    assert (gain / best).min() >= least and (gain / best).max() <= 1 + 1e-6
    margin = (model(x) * torch.tensor([-1, 1])).sum(1).abs().double()
    decided = (margin - best).abs() > (1.001 - least) * best
    assert torch.equal(result.success[decided], (best > margin)[decided])
    assert result.success.any() and not result.success.all() and (result.distance <= eps).all()


def test_each_target_is_made_for_in_turn():
    """Only the 4th likeliest wrong class can be reached, and it has no gradient in the losses that
    do not name it."""

    def model(images):
        fixed = torch.tensor([5.0, 4.9, 4.8, 4.7]).expand(len(images), 4)
        return torch.cat([fixed, 4 + 2 * images.flatten(1).mean(1, keepdim=True)], 1)

    x, labels = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    three, four = (APGD(model, 0.9, steps=20, targets=n).run(x, labels) for n in (3, 4))
    assert not three.success.any() and (three.forwards == 1 + 3 * 21).all()
    assert four.success.all() and (four.prediction == 4).all()
    assert not APGD(model, 0.9, steps=20, loss="dlr").run(x, labels).success.any()


@pytest.mark.parametrize("loss, least", [("margin", 0.95), ("dlr", 0)])
@pytest.mark.parametrize("norm, eps", [("Linf", 0.5), ("L2", 3.0), ("L1", 12.0)])
def test_every_target_is_overtaken(norm, eps, loss, least):
    torch.manual_seed(1)
    model, x = Linear(40, 5), torch.rand(6, 40)
    with torch.no_grad():
        ranked = model(x).topk(5).indices
    target, labels, x = ranked[:, 1:].T.flatten(), ranked[:, 0].repeat(4), x.repeat(4, 1)
    attack = APGD(model, eps, steps=50, norm=norm, targets=4, loss=loss)
    attempts = rows_of(model, x, eps, target=target)
    attack.start(attempts)
    for _ in range(50):
        ask(attack, attempts)
    assert attempts["finished"].all()
    logits, weight = model(attempts["peak"]).detach(), model.weight.T.detach()
    assert (logits.gather(1, target[:, None]) > logits.gather(1, labels[:, None])).all()
    towards = weight[target] - weight[labels]
    gain = (towards * (attempts["peak"] - x)).sum(1).double()
    assert (gain / optimum(towards, x, eps, norm)).min() >= least


def test_few_classes_take_the_targeted_margin():
    torch.manual_seed(3)
    model, x = Curved(20, 3), torch.rand(30, 20)
    labels = model(x).argmax(1)
    dlr, margin = (
        APGD(model, 0.05, steps=15, targets=2, loss=loss).run(x, labels)
        for loss in ("dlr", "margin")
    )
    assert torch.equal(dlr.adversarial, margin.adversarial) and 0 < dlr.success.sum() < 30


SETTINGS = [
    {"norm": "Linf", "eps": 0.05},
    {"norm": "L2", "eps": 0.3, "loss": "dlr"},
    {"norm": "L1", "eps": 0.5},
    {"norm": "L1", "eps": 0.5, "three_radii": True},
    {"norm": "L2", "eps": 0.2, "targets": 3},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_row_does_not_depend_on_rows_at_other_steps(options):
    torch.manual_seed(4)
    model, x = Curved(20, 5), torch.rand(6, 20)
    attack = APGD(model, steps=25, **options)
    target = model(x).topk(2).indices[:, 1]
    alone = []
    for i in range(6):
        attempts = select(rows_of(model, x, options["eps"], target=target), torch.tensor([i]))
        attack.start(attempts)
        for _ in range(25):
            ask(attack, attempts)
        alone.append(attempts)
    early, late = (
        select(rows_of(model, x, options["eps"], target=target), at)
        for at in (torch.arange(3), torch.arange(3, 6))
    )
    attack.start(early)
    for _ in range(9):
        ask(attack, early)
    attack.start(late)
    attempts = joined([late, early])
    for step in range(25):
        ask(attack, attempts)
        if step == 15:
            assert torch.equal(attempts["finished"], torch.tensor([False] * 3 + [True] * 3))
            early = select(attempts, torch.arange(3, 6))
    for name in ("point", "peak", "peak_loss", "alpha"):
        expected = torch.cat([one[name] for one in alone])
        assert torch.equal(early[name], expected[:3]) and torch.equal(
            attempts[name][:3], expected[3:]
        )


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_results_do_not_depend_on_batches(options):
    """All at once, one by one, and through an engine with 4 places, which refills them on the
    way."""
    torch.manual_seed(5)
    model, x = Curved(20, 5), torch.rand(14, 20)
    labels = model(x).argmax(1)
    attack = APGD(model, steps=20, restarts=2, **options)
    together = attack.run(x, labels)
    assert 0 < together.success.sum() < 14
    for i in (0, 5, 13):
        one = attack.run(x[i : i + 1], labels[i : i + 1], torch.tensor([i]))
        assert (
            torch.equal(one.adversarial[0], together.adversarial[i])
            and one.success[0] == together.success[i]
        )
    jobs = {}
    engine = Engine(
        [[Stage(attack)]],
        lambda job, final: jobs.update({job.examples[0].number: job}),
        batch_size=4,
        unit_sizes=[1],
    )
    eps = torch.full((14,), options["eps"], dtype=torch.float64)
    assert engine.run([Chunk(x, labels, torch.arange(14), eps)])
    for i, job in jobs.items():
        assert job.ends[0].fell == together.success[i]
        assert torch.equal(job.ends[0].point, together.adversarial[i])
    assert len(jobs) == 14


def test_three_radii_search_outside_but_find_inside():
    torch.manual_seed(6)
    model, x = Curved(30, 4), torch.rand(8, 30)
    attack = APGD(model, 0.8, steps=40, norm="L1", three_radii=True)
    attempts, ends = rows_of(model, x, 0.8), {0: 3, 12: 2, 24: 1}
    attack.start(attempts)
    factor = 3
    for step in range(40):
        factor = ends.get(step, factor)
        distance = attack.ball(attempts).distance(attempts["point"])
        assert (distance <= factor * 0.8).all() and distance.max() > 0.9 * factor * 0.8
        ask(attack, attempts)
    assert (attack.ball(attempts).distance(attempts["point"]) <= 0.8).all()


@pytest.mark.parametrize("early_stop", [False, True])
def test_points_beyond_the_radius_do_not_count(early_stop):
    """The class changes at an L1 distance of 2 along one pixel; eps is 1, and the search goes to
    3."""

    def model(images):
        return torch.stack([torch.full_like(images[:, 0], 2.0), images[:, 0]], 1) * 10

    x, labels = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    attack = APGD(
        model, 1.0, steps=20, norm="L1", three_radii=True, early_stop=early_stop, bounds=(-5.0, 5.0)
    )
    result = attack.run(x, labels)
    assert not result.found.any() and not result.success.any() and (result.distance <= 1).all()
    assert (result.adversarial[:, 0] > 0.9).all()
    wide = APGD(
        model, 2.5, steps=20, norm="L1", three_radii=True, early_stop=early_stop, bounds=(-5.0, 5.0)
    )
    result = wide.run(x, labels)
    assert result.success.all() and (result.distance <= 2.5).all()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_constant_model_and_a_radius_of_zero(norm):
    x, labels = torch.rand(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64)

    def constant(images):
        return images.flatten(1)[:, :5] * 0 + torch.arange(5, 0, -1.0)

    for loss, targets in (("ce", 0), ("dlr", 0), ("dlr", 2)):
        result = APGD(constant, 0.3, steps=12, norm=norm, loss=loss, targets=targets).run(x, labels)
        assert (
            result.adversarial.isfinite().all()
            and not result.success.any()
            and result.flags["zero_gradient"].all()
        )
    torch.manual_seed(0)
    model = Linear(32, 4)
    labels = model(x).argmax(1)
    for steps in (0, 12):
        assert torch.equal(APGD(model, 0.0, steps=steps, norm=norm)(x, labels), x)
    assert APGD(model, 0.3, steps=0, norm=norm).run(x[:1], labels[:1]).distance.item() <= 0.3


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_starts_lie_on_the_sphere(norm):
    torch.manual_seed(0)
    model, x = Linear(32, 4), torch.full((3, 2, 4, 4), 0.5)
    attack = APGD(model, 0.4, norm=norm)
    attempts = rows_of(model, x, 0.4)
    attack.start(attempts)
    torch.testing.assert_close(attack.ball(attempts).distance(attempts["point"]), attempts["eps"])
    assert (attempts["point"][0] != attempts["point"][1]).any()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_float64_images_and_labels_to_reach(norm):
    torch.manual_seed(7)
    model, x = Linear(24, 4, torch.float64), torch.rand(5, 24, dtype=torch.float64)
    goal = model(x).argmin(1)
    result = APGD(
        model, {"Linf": 0.9, "L2": 4.0, "L1": 20.0}[norm], steps=20, norm=norm, targeted=True
    ).run(x, goal)
    assert result.adversarial.dtype == torch.float64
    assert result.success.all() and torch.equal(result.prediction, goal)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"targets": -2}, "targets must be at least 0, got -2"),
        ({"rho": 1.5}, "rho must be from 0 to 1, got 1.5"),
        ({"three_radii": True}, "three_radii=True goes with norm='L1' alone, got norm='Linf'"),
        ({"targets": 3, "targeted": True}, "targeted=True does not go with APGD"),
        ({"loss": "cw"}, "loss must be one of"),
        ({"loss": "sigmoid", "targets": 3}, "loss must be one of"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        APGD(Linear(4, 3), 0.1, **options)
