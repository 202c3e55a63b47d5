"""Bugs that other libraries have or had: none may be here. The list is that of the survey the
attacks were built on."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from ironmoe.attacks import APGD, FAB, FGSM, MIFGSM, PGD, AutoAttack, Square, evaluate

IMAGES = 0.3 + 0.4 * torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def linear(scale=1.0, classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        model[1].weight.mul_(scale)
    return model


def constant(x):
    return torch.tensor([[1.0, 0.0, -1.0]]).expand(len(x), 3) + 0 * x.flatten(1).sum(
        1, keepdim=True
    )


def test_a_later_restart_does_not_overwrite_an_earlier_success():
    """MadryLab robustness: ``~mask.byte()`` let the last restart win everywhere. Here one image
    falls in one restart of five alone."""
    model, labels = linear(), linear()(IMAGES).argmax(1)
    one = [
        PGD(model, 0.3, steps=0, seed=0, restarts=n).run(IMAGES, labels).success
        for n in range(1, 30)
    ]
    assert all((later | ~earlier).all() for earlier, later in pairwise(one))
    assert one[-1].sum() > one[0].sum()


def test_a_frozen_batch_norm_stays_frozen_and_odd_attributes_do_no_harm():
    """torchattacks put the root in train mode, and took every attribute of a model for one of its
    own."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    ).train()
    model[2].eval()
    model.notes = {"a": torch.ones(3), "b": torch.zeros(2)}
    PGD(model, 0.1, steps=2)(IMAGES, torch.zeros(12, dtype=torch.int64))
    assert [m.training for m in model.modules()] == [True, True, True, False, True]


@pytest.mark.parametrize(
    "make", [FGSM, PGD, MIFGSM, APGD, FAB, lambda m, eps, **o: Square(m, eps, 20, **o)]
)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_zero_gradient_makes_no_nan(make, norm):
    """torchattacks' MIFGSM divided by its norm."""
    result = make(constant, 0.1, norm=norm).run(IMAGES, torch.zeros(12, dtype=torch.int64))
    assert result.adversarial.isfinite().all() and not result.success.any()
    if make is not FAB and not isinstance(make, type(lambda: 0)):
        assert result.flags["zero_gradient"].all()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])
def test_an_l2_step_has_its_length_whatever_the_size_of_the_gradient(scale):
    """cleverhans floored the square of the norm: a gradient of 1e-8 made a step of a hundredth, and
    models looked robust."""
    model = linear(scale).double()
    labels = model(IMAGES.double()).argmax(1)
    result = FGSM(model, 0.1, norm="L2", loss="margin").run(IMAGES.double(), labels)
    torch.testing.assert_close(
        result.distance, torch.full((12,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_the_random_start_in_l2_is_uniform_in_the_ball():
    """torchattacks drew the radius uniformly: most starts near the centre. In d dimensions the mean
    radius is d / (d + 1)."""
    model = linear()
    start = PGD(model, 0.05, steps=0, norm="L2", seed=1)
    images = torch.full((2000, 1, 4, 4), 0.5)
    ball = start.ball({"clean": images, "eps": torch.full((2000,), 0.05, dtype=torch.float64)})
    from ironmoe.attacks.random import example_keys

    radius = ball.distance(ball.random_point(example_keys(1, torch.arange(2000), 0))) / 0.05
    assert abs(radius.mean() - 16 / 17) < 0.005


def test_autoattack_makes_a_hundred_steps():
    """torchattacks' makes ten."""
    assert [stage.steps for stage in AutoAttack(linear(classes=10)).stages] == [100, 100, 100, 5000]


def test_flags_of_bool_are_counted():
    """RobustBench took the mean of a bool tensor when it resumed."""
    model = linear()
    report = evaluate(
        model, (IMAGES, model(IMAGES).argmax(1)), {"pgd": PGD(model, 0.05, steps=2)}, checks=False
    )
    assert 0 <= report.worst_case.value <= 1 and report.as_dict()["worst_case"]["total"] == 12


def test_the_reported_accuracy_is_the_one_measured_again():
    """The complaint users of several libraries share: 49 % reported, 54 % when the images are
    predicted again."""
    model = linear()
    labels = model(IMAGES).argmax(1)
    report = evaluate(
        model,
        (IMAGES, labels),
        {"apgd": APGD(model, 0.06, steps=20)},
        keep_adversarial=True,
        checks=False,
    )
    again = model(report.attacks["apgd"].adversarial).argmax(1) == labels
    assert torch.equal(again, report.attacks["apgd"].robust)
