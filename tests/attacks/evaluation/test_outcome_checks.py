"""Checks of what attacks did: where nothing was attacked, nothing moved, or everything may."""

import math

import pytest
import torch
import toys

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
    Square,
    check_outcome,
    evaluate,
)

NOTHING = "nothing to attack"
LARGE = "radius larger than the box"
SMALL = "radius too small"
STILL = "attacks without a gradient"


@pytest.fixture(scope="module")
def data():
    return toys.blobs(60)


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(*data).float()


@pytest.fixture(scope="module")
def sure(model):
    """So sure that the cross-entropy has no gradient in float32."""
    return lambda x: 1e4 * model(x)


def flags_of(model, data, attack, **options):
    report = evaluate(model, data, {"it": attack}, **options)
    return {flag.name: flag for flag in report.checks}


@pytest.mark.parametrize("attack", [PGD, APGD, MIFGSM, FGSM])
def test_an_attack_whose_loss_is_flat_is_named(model, sure, data, attack):
    steps = {} if attack is FGSM else {"steps": 3}
    flag = flags_of(sure, data, attack(sure, 0.06, **steps))[STILL]
    assert flag.tripped and flag.value > 0.9 and flag.message.startswith("it began")
    for loss in ("margin", "dlr"):
        assert not flags_of(sure, data, attack(sure, 0.06, loss=loss, **steps))[STILL].tripped
    assert not flags_of(model, data, attack(model, 0.06, **steps))[STILL].tripped


@pytest.mark.parametrize("attack", [PGD, APGD, FAB, DeepFool, CW])
def test_attacks_on_a_model_of_rounded_images_stand_still(model, data, attack):
    def rounded(x):
        return model((255 * x).round() / 255)

    norm = {"norm": "L2"} if attack in (CW, DeepFool) else {}
    flag = flags_of(rounded, data, attack(rounded, eps=0.05, steps=3, **norm))[STILL]
    assert flag.tripped and flag.value == 1


def test_a_part_of_a_chain_that_stands_still_is_seen(sure, data):
    attack = AutoAttack(sure, version="custom", attacks_to_run=["apgd-ce", "apgd-t"], eps=0.02)
    for part in attack.stages:
        part.steps = part.max_queries = 3
    assert flags_of(sure, data, attack)[STILL].tripped


def test_a_share_of_one_hundredth_may_stand_still(model, data):
    report = evaluate(model, data, {"it": PGD(model, 0.001, steps=2)}, checks=False)
    summary = report.attacks["it"]
    for count, tripped in ((0, False), (1, True)):
        summary.flags["zero_gradient"][:] = torch.arange(60) < count
        flag = next(flag for flag in check_outcome(report) if flag.name == STILL)
        assert flag.tripped == tripped and flag.value == pytest.approx(count / 60)
    summary.fell[:] = True
    flag = next(flag for flag in check_outcome(report) if flag.name == STILL)
    assert not flag.tripped


def test_a_gradient_that_is_not_asked_for_is_not_missed(sure, data):
    assert not flags_of(sure, data, Square(sure, 0.02, steps=5))[STILL].tripped


@pytest.mark.parametrize("norm, size", [("Linf", 1), ("L2", math.sqrt(144)), ("L1", 144)])
def test_a_radius_as_large_as_the_box_is_seen(model, data, norm, size):
    for eps, tripped in ((0.99 * size, False), (size, True), (255 * size, True)):
        flag = flags_of(model, data, PGD(model, eps, steps=1, norm=norm))[LARGE]
        assert flag.tripped == tripped and flag.value == pytest.approx(eps / size)


def test_the_box_is_that_of_the_bounds(model, data):
    def shifted(x):
        return model((x + 3) / 5)

    images = 5 * data[0] - 3
    attack = PGD(shifted, 4.9, steps=1, bounds=(-3.0, 2.0))
    assert not flags_of(shifted, (images, data[1]), attack)[LARGE].tripped
    flag = flags_of(shifted, (images, data[1]), attack, eps=[0.1, 5.1])[LARGE]
    assert flag.tripped and flag.value == pytest.approx(1.02)


def test_no_radius_at_all_is_fine_for_the_least_distance(model, data):
    assert not flags_of(model, data, DeepFool(model, steps=2))[LARGE].tripped


def test_true_labels_under_a_targeted_attack(model, data):
    images = data[0]
    predicted = model(images).argmax(1)
    attack = PGD(model, 0.1, steps=2, targeted=True)
    flag = flags_of(model, (images, predicted), attack)[NOTHING]
    assert flag.tripped and flag.value == 1 and "labels are the classes to reach" in flag.message
    mostly = torch.where(torch.arange(60) < 20, (predicted + 1) % 4, predicted)
    assert flags_of(model, (images, mostly), attack)[NOTHING].tripped
    assert not flags_of(model, (images, (predicted + 1) % 4), attack)[NOTHING].tripped


def test_labels_that_are_all_wrong(model, data):
    images = data[0]
    wrong = (model(images).argmax(1) + 1) % 4
    for attack in (PGD(model, 0.1, steps=2), Square(model, 0.1, steps=2)):
        flag = flags_of(model, (images, wrong), attack)[NOTHING]
        assert flag.tripped and "attacked no image: the model is wrong" in flag.message
    wrong[:6] = model(images).argmax(1)[:6]
    assert not flags_of(model, (images, wrong), PGD(model, 0.1, steps=2))[NOTHING].tripped


def test_a_budget_that_ends_before_any_attack(model, data):
    attack = PGD(model, 0.1, steps=5)
    flag = flags_of(model, data, attack, max_forwards=61)[NOTHING]
    assert flag.tripped and "the budget ended before an attack began" in flag.message
    assert not flags_of(model, data, attack, max_forwards=1000)[NOTHING].tripped


def test_images_that_are_all_skipped(model, data):
    def broken(x):
        return model(x) * float("nan")

    attack = PGD(broken, 0.1, steps=2)
    report = evaluate(broken, data, {"it": attack}, on_bad="skip")
    flag = next(flag for flag in report.checks if flag.name == NOTHING)
    assert flag.tripped and "all were skipped" in flag.message


def test_a_decision_based_attack_that_beats_gradients_is_seen_as_square_is(model, data):
    def masked(x):
        return model(x.detach() + 0 * x)

    attacks = {"pgd": PGD(masked, 0.3, steps=3), "hop": HopSkipJump(masked, 0.3, steps=5)}
    report = evaluate(masked, data, attacks)
    flag = next(flag for flag in report.checks if flag.name.startswith("Square"))
    assert flag.tripped and flag.message.startswith("hop broke")


def test_a_larger_radius_or_another_norm_beats_nothing(model, data):
    for square in (Square(model, 0.4, steps=40), Square(model, 9.0, norm="L2", steps=40)):
        report = evaluate(model, data, {"pgd": PGD(model, 0.01, steps=5), "square": square})
        assert report.attacks["square"].fell.any()
        flag = next(flag for flag in report.checks if flag.name.startswith("Square"))
        assert not flag.tripped and "Not looked at" in flag.message


@pytest.mark.parametrize("attack", [PGD, APGD, MIFGSM])
def test_a_gradient_where_nothing_may_move_is_none(model, data, attack):
    """A patch on the upper half of images of which the model sees the lower one."""
    upper = (torch.arange(12) < 6).view(1, 12, 1).expand(1, 12, 12)

    def blind(x):
        return model(torch.where(upper, 0.5, x))

    images = data[0], blind(data[0]).argmax(1)
    flag = flags_of(blind, images, attack(blind, 0.3 * upper.float(), steps=3))[STILL]
    assert flag.tripped and flag.value == 1
    assert not flags_of(blind, images, attack(blind, 0.3 * (~upper).float(), steps=3))[
        STILL
    ].tripped


def test_features_that_may_not_move_have_no_gradient():
    """An eps (D,) for the rows of a table, of which the model sees one that may not move."""
    rows = torch.rand(20, 6)

    def model(x):
        return torch.stack([x[:, 0], 0.5 - x[:, 0]], 1)

    labels = model(rows).argmax(1)
    eps = torch.tensor([0.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    flag = flags_of(model, (rows, labels), PGD(model, eps, steps=2))[STILL]
    assert flag.tripped and flag.value == 1


def test_a_patch_may_be_of_any_colour(model, data):
    """A radius as large as the box is no sign where most of the image stays."""
    patch = torch.zeros(1, 12, 12)
    patch[:, :4, :4] = 1
    assert not flags_of(model, data, PGD(model, patch, steps=2))[LARGE].tripped
    assert flags_of(model, data, PGD(model, patch + 1, steps=2))[LARGE].tripped


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_radius_at_which_nothing_can_change_is_named(model, data, norm):
    images = (data[0] * 255).round() / 255
    corner = torch.zeros(images.shape[1:])
    corner[..., 0] = 1.0
    cases = (
        (0.0, None, True),
        (0 * corner, None, True),
        (1e-6, None, False),
        (1e-6 * corner, None, False),
        (0.9 / 255, 256, True),
        (1 / 255, 256, False),
        (0.9 / 255 * corner, 256, True),
        (1 / 255 * corner, 256, False),
    )
    for eps, levels, trips in cases:
        attack = PGD(model, eps, norm=norm, levels=levels, steps=2)
        assert (SMALL in flags_of(model, (images, data[1]), attack)) == trips, (eps, levels)
    several = flags_of(model, (images, data[1]), PGD(model, 0.01, norm=norm), eps=[0.0, 0.01])
    assert SMALL not in several


def test_a_radius_in_other_units_than_the_bounds_is_named(model, data):
    images = (data[0] * 255).round()

    def of_bytes(x):
        return model(x / 255)

    attack = PGD(of_bytes, 8 / 255, bounds=(0, 255), levels=256, steps=2)
    assert flags_of(of_bytes, (images, data[1]), attack)[SMALL].tripped


def test_without_bounds_there_is_no_radius_too_small(model, data):
    attack = PGD(model, 0.1, bounds=(-math.inf, math.inf), steps=2)
    assert SMALL not in flags_of(model, data, attack)
