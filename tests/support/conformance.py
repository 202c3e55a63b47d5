"""What every registered attack promises in each of its norms, as checks of one attack in one norm.

The cases come from the register of attacks, so an attack that registers itself is among them.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import nn

from ironmoe.attacks import evaluate, registry
from ironmoe.attacks.balls.abilities import HyperplaneBall
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.balls.elements import region_of
from ironmoe.moe.routers.groups import Grouped

# Products of differently shaped batches differ in their last bits. Attacks inside the ball follow
# gradients, whose normalised steps have more rounding than those to a boundary.
ROUNDING = 1e-7
ROUNDING_OF_BOUNDARIES = 1e-9

# An ensemble runs parts that are cases of their own; two of them are enough to see it at work.
# HopSkipJump asks for many labels, and few of them show as much.
SHORT = {
    "AutoAttack": {"version": "custom", "attacks_to_run": ("apgd-t", "fab-t")},
    "hopskipjump": {"initial_probes": 20, "max_probes": 40, "start_tries": 20},
}


class Case(NamedTuple):
    """An attack in a norm."""

    name: str
    kind: type
    takes: tuple
    settings: dict
    norm: str

    def make(self, model, eps, steps=6, **options):
        given = {"steps": steps} if "steps" in self.takes else {}
        settings = {**self.settings, **given, "eps": eps, "norm": self.norm, **options}
        attack = self.kind(model, **settings)
        if attack.stages[0] is not attack:  # the parts of an ensemble are long
            for stage in attack.stages:
                stage.steps = stage.max_queries = min(stage.steps, steps)
        return attack

    def __str__(self):
        return f"{self.name} in {self.norm}"


def cases():
    """Of every class under all of its names; an ensemble once."""
    found = []
    for name, entry in registry.ATTACKS.items():
        settings = {name: SHORT[name]} if name in SHORT else entry.names or {name: {}}
        found += [
            Case(label, entry.kind, entry.takes, dict(own), norm)
            for label, own in settings.items()
            for norm in entry.kind.norms
        ]
    return found


def one_norm_each(found):
    """Of cases that differ in the norm alone, the first."""
    return list({case.name: case for case in reversed(found)}.values())


def holds_for_all(check, *arguments, among):
    """Run a check on several cases, and name all of those in which it fails."""
    failures = []
    for case in among:
        try:
            check(case, *arguments)
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


# Data and models, all small, in float64 so that no verdict hangs on rounding. All cases share them,
# and none changes them.


@functools.cache
def images(count=14, size=16):
    generator = torch.Generator().manual_seed(1)
    return 0.3 + 0.4 * torch.rand(count, 1, 4, size // 4, generator=generator, dtype=torch.float64)


@functools.cache
def network(classes=3, dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, classes))
    return nn.Sequential(*layers).to(dtype)


def labels_of(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def radius(norm):
    """A radius at which a part of the images falls."""
    usual = {"Linf": 0.05, "L2": 0.2, "L1": 0.8}
    return usual.get(norm, 0.05)


# The checks.


def reaches_the_closed_form(case):
    """Between two classes of a linear model no point is nearer than the hyperplane; attacks with
    gradients cross it where it is well inside the ball."""
    ball = ball_of(case.norm)
    if not issubclass(ball, HyperplaneBall):
        return
    torch.manual_seed(2)
    weight = torch.randn(16, dtype=torch.float64)
    x = images(8)
    middle = (x.flatten(1) @ weight).quantile(0.5)  # between two images

    def model(at):
        score = at.flatten(1) @ weight.to(at.dtype) - middle
        return torch.stack([-score, score], 1)

    labels = labels_of(model, x)
    value = x.flatten(1) @ weight - middle
    step = ball.step_to_hyperplane(x, weight.expand(8, -1).view_as(x), value, (0.0, 1.0))
    least = ball.length(step)
    eps = float(least.median())

    steps = 40 if case.kind.gradient else 10
    result = case.make(model, eps, steps=steps).run(x, labels)
    assert not result.success[least > eps * (1 + 1e-9)].any(), "a success beyond the hyperplane"
    if case.kind.gradient:
        assert result.success[least < 0.8 * eps].all(), "an image held inside the ball"


def stays_in_ball_and_box(case):
    """In bounds other than (0, 1), in float32; successes are what the model says they are."""
    model = network(dtype=torch.float32)
    bounds = (-1.0, 3.0)
    x = (4 * images() - 1).float()
    labels = labels_of(model, x)
    labels[::5] = (labels[::5] + 1) % 3  # misclassified from the start
    eps = 4 * radius(case.norm)
    attack = case.make(model, eps, bounds=bounds)
    result = attack.run(x, labels)

    ball = ball_of(case.norm)(x, torch.full((14,), eps, dtype=torch.float64), bounds)
    distance = ball.distance(result.adversarial)
    assert (distance <= eps).all() and torch.equal(distance, result.distance)
    low, high = attack.ball({"clean": x, "eps": ball.eps}).bounds
    assert (result.adversarial >= low).all() and (result.adversarial <= high).all()

    prediction = labels_of(model, result.adversarial)
    assert torch.equal(result.prediction, prediction)
    assert torch.equal(result.success, result.clean_correct & (prediction != labels))
    assert not result.clean_correct[::5].any()
    if not case.kind.attacks_wrong:
        wrong = ~result.clean_correct
        assert torch.equal(result.adversarial[wrong], x[wrong])


def elements(norm, dtype=torch.float32):
    """(eps, bounds) that differ from element to element: half of them may not move."""
    generator = torch.Generator().manual_seed(5)
    shape = (1, 4, 4)
    eps = 0.2 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)
    eps = eps * (torch.rand(shape, generator=generator) < 0.5)
    low = -0.1 * torch.rand(shape, generator=generator)
    high = torch.linspace(0.75, 1, 4)
    return 6 * radius(norm) * eps, (low.to(dtype), high.to(dtype))


def ball_with(norm, x, eps, bounds):
    """The balls around images whose eps and bounds differ from element to element."""
    region = region_of(eps, bounds, x.shape)
    eps = region.radius.expand(len(x))
    return ball_of(norm).scaled()(x, eps, bounds, region.scale)


def keeps_to_radii_and_bounds_of_elements(case):
    """In float32; what may not move keeps its bits, and Linf keeps each element within its eps."""
    model = network(dtype=torch.float32)
    x = images().float()
    labels = labels_of(model, x)
    eps, bounds = elements(case.norm)
    attack = case.make(model, eps, bounds=bounds, steps=20)
    result = attack.run(x, labels)
    change = (result.adversarial.double() - x.double()).abs()

    assert result.success.any()
    assert not change[:, eps == 0].any(), "an element moved that may not"
    if case.norm == "Linf":
        assert (change <= eps).all()
    ball = ball_with(case.norm, x, eps, bounds)
    assert torch.equal(ball.distance(result.adversarial), result.distance)
    assert (result.distance <= eps.max()).all()
    low, high = attack.ball({"clean": x, "eps": ball.eps}).bounds
    assert (result.adversarial >= low).all() and (result.adversarial <= high).all()

    prediction = labels_of(model, result.adversarial)
    assert torch.equal(result.success, prediction != labels)
    assert "0." not in repr(attack).split("eps=")[1].split(" up to")[0], "a whole tensor printed"


def reaches_the_closed_form_with_radii_of_elements(case):
    """As ``reaches_the_closed_form``, where half of the elements may not move."""
    ball = ball_of(case.norm)
    if not issubclass(ball, HyperplaneBall):
        return
    torch.manual_seed(2)
    weight = torch.randn(16, dtype=torch.float64)
    x = images(8)
    middle = (x.flatten(1) @ weight).quantile(0.5)

    def model(at):
        score = at.flatten(1) @ weight.to(at.dtype) - middle
        return torch.stack([-score, score], 1)

    shape, bounds = elements(case.norm, torch.float64)
    where = ball_with(case.norm, x, shape / shape.max(), bounds)
    value = x.flatten(1) @ weight - middle
    weights = weight.view(1, 1, 4, 4).expand_as(x)
    step = where.step_onto(x, weights, value)
    least = where.measure(step)
    left = value + (weights * step).flatten(1).sum(1)
    least = torch.where(left.abs() > 1e-9, float("inf"), least)  # the box ends before
    eps = float(least[least.isfinite()].median())

    steps = 40 if case.kind.gradient else 10
    attack = case.make(model, eps * shape / shape.max(), steps=steps, bounds=bounds)
    result = attack.run(x, labels_of(model, x))
    assert not result.success[least > eps * (1 + 1e-9)].any(), "a success beyond the hyperplane"
    if case.kind.gradient:
        assert result.success[least < 0.8 * eps].all(), "an image held inside the ball"


def keeps_to_the_grid(case):
    """With and without elements that may not move; nothing that the search found is lost."""
    model = network(dtype=torch.float32)
    x = (images().float() * 40).round() / 40
    labels = labels_of(model, x)
    mask = (torch.arange(16) % 3 > 0).view(1, 4, 4)
    for eps in (4 * radius(case.norm), 6 * radius(case.norm) * mask):
        attack = case.make(model, eps, bounds=(0.0, 1.0), levels=41, steps=20)
        result = attack.run(x, labels)
        steps = (result.adversarial * 40).round()
        assert torch.equal(result.adversarial, steps / 40)
        assert result.success.any()
        if case.kind.inside:
            assert torch.equal(result.found, result.success)

        change = (steps - (x * 40).round()).double() / 40
        allowed = torch.as_tensor(eps, dtype=torch.float64).expand(1, 4, 4)
        assert not change[(allowed == 0).expand_as(change)].any(), "an element moved that may not"
        ball = ball_of(case.norm)(torch.zeros_like(change), allowed.flatten()[-1:], (-1.0, 1.0))
        assert (ball.distance(change) <= allowed.max() * (1 + 1e-9)).all()
        assert (result.distance <= allowed.max()).all()
        torch.testing.assert_close(result.distance, ball.distance(change))
        assert torch.equal(result.success, labels_of(model, result.adversarial) != labels)


def takes_a_tensor_of_one_number_as_the_number(case):
    """Bit by bit, with as many passes."""
    model, x = network(), images(6)
    labels = labels_of(model, x)
    eps = radius(case.norm)
    plain = case.make(model, eps, bounds=(0.0, 1.0), steps=3).run(x, labels)
    for shape in ((4,), (6, 1, 1, 1), (6, 1, 4, 4)):
        value = torch.full(shape, eps, dtype=torch.float64)
        bounds = (torch.zeros(4), torch.ones(1, 4, 4))
        result = case.make(model, value, bounds=bounds, steps=3).run(x, labels)
        assert torch.equal(result.adversarial, plain.adversarial)
        assert torch.equal(result.forwards, plain.forwards)


def reaches_targets_or_refuses_them(case):
    model, x = network(), images()
    targets = (labels_of(model, x) + 1) % 3
    try:
        attack = case.make(model, 20 * radius(case.norm), targeted=True, steps=20)
    except ValueError as error:
        assert "targeted" in str(error)
        return
    result = attack.run(x, targets)
    assert result.clean_correct.all() and result.success.any()
    assert torch.equal(labels_of(model, result.adversarial) == targets, result.success)


def counts_its_passes(case):
    """With and without a mean of several answers."""
    model, x = network(), images(6)
    labels = labels_of(model, x)
    for eot in (1, 3):
        rows = []

        def counting(at, rows=rows):
            rows.append((len(at), torch.is_grad_enabled()))
            return model(at)

        result = case.make(counting, radius(case.norm), eot=eot).run(x, labels)
        assert int(result.forwards.sum()) == sum(count for count, _ in rows)
        assert int(result.backwards.sum()) == sum(count for count, grad in rows if grad)


class Pairs(nn.Module):
    """Says that it couples pairs of images, as a capacity would."""

    def __init__(self):
        super().__init__()
        self.inner = network()
        self.group = Grouped(images_per_group=2)

    def forward(self, x):
        assert len(x) % 2 == 0, "a group was torn apart"
        return self.inner(x)


def keeps_groups_together_or_refuses_them(case):
    model, x = Pairs(), images()
    attack = case.make(model, radius(case.norm))
    if case.kind.takes_groups:
        result = attack.run(x, labels_of(model, x))
        assert torch.equal(labels_of(model, result.adversarial), result.prediction)
        return
    with contextlib.suppress(ValueError):
        attack.run(x, labels_of(model, x))
        raise AssertionError("it took images that influence each other")


def does_not_depend_on_the_batch(case):
    """Nor on the order; and the same call gives the same bits."""
    model, x = network(), images(8)
    labels = labels_of(model, x)
    attack = case.make(model, radius(case.norm), seed=3)
    whole = attack.run(x, labels)
    assert torch.equal(whole.adversarial, attack.run(x, labels).adversarial)

    close = ROUNDING if case.kind.inside else ROUNDING_OF_BOUNDARIES
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    turned = attack.run(x[order], labels[order], order)
    back = order.argsort()
    assert torch.equal(turned.success[back], whole.success)
    assert torch.equal(turned.steps[back], whole.steps)
    torch.testing.assert_close(turned.adversarial[back], whole.adversarial, rtol=0, atol=close)

    one = attack.run(x[7:8], labels[7:8], torch.tensor([7]))
    assert torch.equal(one.steps, whole.steps[7:8])
    torch.testing.assert_close(one.adversarial, whole.adversarial[7:8], rtol=0, atol=close)

    report = evaluate(
        model, (x, labels), {"a": attack}, batch_size=3, checks=False, keep_adversarial=True
    )
    summary = report.attacks["a"]
    assert torch.equal(summary.fell, whole.success)
    torch.testing.assert_close(summary.adversarial, whole.adversarial, rtol=0, atol=close)


def goes_on_from_a_cut_journal(case, folder):
    model, x = network(), images(8)
    data = (x, labels_of(model, x))
    options = {"checks": False, "batch_size": 4, "keep_adversarial": True}
    options["eps"] = [radius(case.norm) / 2, radius(case.norm)]
    place = folder / str(case)

    def run(**more):
        attack = case.make(model, radius(case.norm))
        return evaluate(model, data, {"a": attack}, **options, **more).attacks["a"]

    whole = run(journal=place)
    file = place / "journal-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:30])
    resumed = run(journal=place)
    for field in ("fell", "decided", "prediction", "distance", "steps", "adversarial"):
        torch.testing.assert_close(
            getattr(whole, field), getattr(resumed, field), rtol=0, atol=ROUNDING
        )
