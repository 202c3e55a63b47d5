"""eps and bounds as arguments: which shapes mean what, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ironmoe.attacks import CW, FAB, PGD, AutoAttack, DeepFool, JournalError, evaluate
from ironmoe.attacks.balls.ball import NORMS, register_norm
from ironmoe.attacks.balls.elements import region_of
from ironmoe.attacks.balls.linf import LinfBall

SHAPE = (5, 3, 4, 6)


def model(at):
    return at.flatten(1)[:, :2]


@pytest.mark.parametrize(
    "shape, one_each",
    [
        ((), False), ((1,), False), ((6,), False), ((4, 1), False), ((3, 1, 1), False),
        ((3, 4, 6), False), ((1, 3, 1, 6), False), ((5,), True), ((5, 1, 1, 1), True),
        ((5, 3, 1, 1), True), (SHAPE, True),
    ],
)  # fmt: skip
def test_eps_means_what_it_broadcasts_to(shape, one_each):
    torch.manual_seed(0)
    eps = torch.rand(shape, dtype=torch.float64)
    region = region_of(eps, (0.0, 1.0), SHAPE)
    meant = eps.view(5, 1, 1, 1) if shape == (5,) else eps
    meant = meant.expand(SHAPE)
    radius = region.radius.view(-1, 1, 1, 1)
    scale = 1.0 if region.scale is None else region.scale
    torch.testing.assert_close((radius * scale).expand(SHAPE), meant, rtol=1e-15, atol=0)
    assert torch.equal(region.radius.expand(5), meant.flatten(1).amax(1))
    assert (len(region.radius) == 5) == one_each
    differs = not torch.equal(meant, meant.flatten(1).amax(1).view(5, 1, 1, 1).expand(SHAPE))
    assert (region.scale is not None) == differs
    assert ("eps_scale" in region.side) == (one_each and differs)


@pytest.mark.parametrize("shape", [(3,), (2,), (5, 3), (3, 4, 6, 1), (2, 3, 4, 6), (1, 5, 3, 4, 6)])
def test_eps_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"eps must be a number or have shape \(5,\), .* got shape"
    ):
        region_of(torch.rand(shape), (0.0, 1.0), SHAPE)


def test_eps_that_can_be_read_in_two_ways_is_refused_unless_both_are_the_same():
    eps = torch.tensor([0.1, 0.2, 0.3])
    for shape in ((3, 3), (3, 2, 2, 3)):
        with pytest.raises(
            ValueError, match=r"eps of shape \(3,\) must say what it means"
        ) as error:
            region_of(eps, (0.0, 1.0), shape)
        for way in ((3,) + (1,) * (len(shape) - 1), (1,) * (len(shape) - 1) + (3,)):
            assert str(way) in str(error.value)
            region_of(eps.view(way), (0.0, 1.0), shape)
        same = region_of(torch.full((3,), 0.1), (0.0, 1.0), shape)
        assert same.scale is None
        with pytest.raises(ValueError, match="bounds of shape"):
            region_of(0.1, (0.0, eps), shape)

    # One image: each way gives the same.
    assert region_of(torch.tensor([0.1]), (0.0, 1.0), (1, 1)).scale is None


def test_radius_times_scale_is_never_more_than_eps_and_nearly_always_eps():
    torch.manual_seed(1)
    eps = torch.rand(1000, 7, dtype=torch.float64)
    region = region_of(eps, (0.0, 1.0), (1000, 7))
    product = region.radius[:, None] * region.scale
    assert (product <= eps).all() and (region.scale <= 1).all()
    torch.testing.assert_close(product, eps, rtol=3e-16, atol=0)
    assert (product == eps).double().mean() > 0.9


def test_an_infinite_eps_is_a_mask():
    eps = torch.tensor([0.0, math.inf])
    region = region_of(eps, (0.0, 1.0), (5, 2))
    assert region.scale.tolist() == [[0.0, 1.0]] and region.radius.isinf().all()
    with pytest.raises(ValueError, match="eps must be infinite in all elements of an image"):
        region_of(torch.tensor([0.1, math.inf]), (0.0, 1.0), (5, 2))
    x = torch.rand(8, 4)
    labels = model(x).argmax(1)
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0])
    eps = torch.where(mask > 0, math.inf, 0.0)
    for attack in (
        CW(model, eps, steps=100, search_steps=5),
        DeepFool(model, eps),
        FAB(model, eps, early_stop=False),
    ):
        result = attack.run(x, labels)
        assert torch.equal(result.adversarial[:, 1:], x[:, 1:])
        assert result.success.any() and result.distance[result.success].isfinite().all()


def test_bounds_are_numbers_where_all_elements_have_the_same():
    low, high = torch.zeros(3, 1, 1), torch.ones(6)
    region = region_of(0.1, (low, high), SHAPE)
    assert (region.low, region.high) == (0.0, 1.0)
    region = region_of(0.1, (0, torch.linspace(1, 2, 5)), SHAPE)
    assert region.low.shape == (1, 1, 1, 1) and region.high.shape == (5, 1, 1, 1)
    assert list(region.side) == ["high_bound"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"eps": "8/255"}, TypeError, "eps must be a number .*, got '8/255'; write 8 / 255"),
        ({"eps": None}, TypeError, "eps must be a number or a tensor of numbers, got None"),
        ({"eps": torch.ones(4, dtype=torch.bool)}, TypeError, "write mask \\* radius"),
        ({"eps": torch.tensor([0.1, math.nan])}, ValueError, "at least 0, got nan at \\[1\\]"),
        ({"eps": torch.tensor([[0.1], [-2.0]])}, ValueError, "got -2 at \\[1, 0\\]"),
        ({"eps": torch.tensor([0.1, math.inf])}, ValueError, "finite and at least 0, got inf"),
        ({"bounds": None}, TypeError, "bounds must be \\(lowest, highest\\), .* got None"),
        ({"bounds": (0, "1/2")}, TypeError, "bounds must be a number .*; write 1 / 2"),
        ({"bounds": (0.0, math.nan)}, ValueError, "with lowest < highest"),
        ({"bounds": (1, 1)}, ValueError, "with lowest < highest"),
        ({"bounds": (0, 1, 2)}, ValueError, "with lowest < highest"),
        (
            {"bounds": (torch.tensor([0.0, 2.0]), 1.0)},
            ValueError,
            "lowest < highest, got \\(2, 1\\) at \\[1\\]",
        ),
        (
            {"bounds": (torch.zeros(2), torch.tensor([1.0, math.inf])), "norm": "L1"},
            ValueError,
            "bounds must be finite for PGD in L1",
        ),
    ],
)
def test_what_cannot_be_eps_or_bounds_is_named(options, error, message):
    with pytest.raises(error, match=message):
        PGD(model, **{"eps": 0.1, **options})


def test_lists_and_arrays_are_tensors():
    x = torch.rand(3, 2)
    labels = model(x).argmax(1)
    wanted = PGD(model, torch.tensor([0.0, 0.5])).run(x, labels).adversarial
    for eps in ([0.0, 0.5], np.array([0.0, 0.5]), np.array([0.0, 0.5], dtype=np.float32)):
        assert torch.equal(PGD(model, eps).run(x, labels).adversarial, wanted)
    for number in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 1):
        PGD(model, number).run(x, labels)


def test_an_element_between_equal_bounds_stays():
    """Bounds taken from data have features of one value."""
    torch.manual_seed(2)
    x = torch.rand(8, 4)
    x[:, 2] = 0.3
    labels = model(x).argmax(1)
    bounds = (x.amin(0), x.amax(0))
    for attack in (PGD(model, 0.5, bounds=bounds), CW(model, bounds=bounds, steps=30)):
        result = attack.run(x, labels)
        assert result.adversarial.isfinite().all()
        assert torch.equal(result.adversarial[:, 2], x[:, 2])


def test_images_outside_the_bounds_of_their_elements_are_named():
    x = torch.full((4, 3), 0.5)
    x[2, 1] = 0.9
    bounds = (torch.zeros(3), torch.tensor([1.0, 0.8, 1.0]))
    with pytest.raises(ValueError, match=r"images must lie in bounds .* first in example 2"):
        PGD(model, 0.1, bounds=bounds).run(x, model(x).argmax(1))


def test_no_images_and_images_of_stride_zero():
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    none = torch.zeros(0, 4)
    assert PGD(model, mask).run(none, none.argmax(1)).adversarial.shape == (0, 4)
    one = torch.rand(1, 4)
    same = one.expand(5, 4)
    labels = model(same).argmax(1)
    result = PGD(model, (0.5 * mask)[:1].expand(4) * mask, seed=1).run(same, labels)
    assert torch.equal(result.adversarial[:, 1::2], same[:, 1::2])
    assert torch.equal(same, one.expand(5, 4))


def test_a_norm_of_a_user_without_radii_of_elements_refuses_them():
    @register_norm
    class Half(LinfBall):
        norm = "half"

    try:
        x = torch.rand(3, 4)
        labels = model(x).argmax(1)
        PGD(model, torch.tensor([0.1, 0.2, 0.0]), norm="half").run(x, labels)
        with pytest.raises(ValueError, match="must be the same for all elements in half"):
            PGD(model, torch.tensor([0.1, 0.2, 0.1, 0.0]), norm="half").run(x, labels)
    finally:
        del NORMS["half"]


def test_a_printed_attack_names_the_shape_of_its_eps():
    inner = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    eps = torch.linspace(0, 0.25, 9).view(1, 3, 3)
    assert "eps=tensor (1, 3, 3) up to 0.25" in repr(PGD(inner, eps))
    assert "eps=0.1," in repr(PGD(inner, 0.1))


def wavy(at):
    """Two logits of all elements."""
    turns = at.flatten(1) * torch.arange(1, 7, dtype=at.dtype) / 2 - 1
    score = (turns * turns * turns - 2 * turns).sum(1) - 2.2
    return torch.stack([score, -score], 1)


@pytest.mark.parametrize("norm, radius", [("Linf", 0.3), ("L2", 0.6), ("L1", 1.0)])
@pytest.mark.parametrize("kind", [PGD, FAB])
def test_each_image_may_have_radii_and_bounds_of_its_own(norm, radius, kind):
    """The whole batch does what each image does by itself."""
    torch.manual_seed(3)
    x = torch.rand(6, 1, 2, 3, dtype=torch.float64)
    labels = wavy(x).argmax(1)
    eps = radius * torch.rand(6, 1, 2, 3, dtype=torch.float64)
    eps = eps * (torch.rand(6, 1, 2, 3) < 0.7)
    low, high = x - 0.2 * torch.rand(6, 1, 1, 1), torch.linspace(1, 1.2, 6)
    numbers = torch.arange(6)

    result = kind(wavy, eps, norm=norm, bounds=(low, high), steps=20).run(x, labels)
    assert result.success.any() and not result.success.all()
    change = result.adversarial - x
    assert not change[eps == 0].any()
    assert (result.adversarial >= low).all()
    assert (result.adversarial <= high.view(6, 1, 1, 1)).all()
    if norm == "Linf":
        assert (change.abs() <= eps).all()
    for one in range(6):
        part = slice(one, one + 1)
        box = (low[part], float(high[one]))
        alone = kind(wavy, eps[part], norm=norm, bounds=box, steps=20)
        alone = alone.run(x[part], labels[part], numbers[part])
        torch.testing.assert_close(alone.adversarial, result.adversarial[part])
        assert torch.equal(alone.steps, result.steps[part])


def test_bounds_of_images_that_cross_are_named():
    x = torch.full((5, 1, 2, 3), 0.5)
    high = torch.where(torch.arange(5) == 4, 0.0, 1.2)
    attack = PGD(wavy, 0.1, bounds=(torch.full_like(x, 0.1), high))
    with pytest.raises(ValueError, match=r"lowest < highest, got .* at \[4, 0, 0, 0\]"):
        attack.run(x, wavy(x).argmax(1))


def test_an_evaluation_takes_radii_of_elements_and_boxes_of_images():
    torch.manual_seed(4)
    x = torch.rand(20, 1, 2, 3, dtype=torch.float64)
    data = (x, wavy(x).argmax(1))
    eps = torch.tensor([0.3, 0.0, 0.15], dtype=torch.float64)
    options = {"checks": True, "keep_adversarial": True}

    report = evaluate(wavy, data, {"pgd": PGD(wavy, eps)}, **options)
    alone = PGD(wavy, eps).run(*data)
    assert torch.equal(report.attacks["pgd"].fell, alone.success)
    assert report.attacks["pgd"].eps == (0.3,)

    # Other radii keep the proportions of the elements.
    report = evaluate(wavy, data, {"pgd": PGD(wavy, eps)}, eps=[0.1, 0.6], **options)
    change = (report.attacks["pgd"].adversarial - x).abs()
    assert (change <= 2 * eps).all() and change.max() > 0.3
    third = PGD(wavy, eps / 3).run(*data)
    assert torch.equal(report.attacks["pgd"].fell_at <= 0.1, third.success)

    for shape in ((20,), (20, 1, 1, 1), (20, 1, 2, 3)):
        attack = PGD(wavy, 0.1 + torch.rand(shape))
        with pytest.raises(ValueError, match="eps must be the same for all images"):
            evaluate(wavy, data, {"pgd": attack})
        attack = PGD(wavy, 0.1, bounds=(0, 1 + torch.rand(shape)))
        report = evaluate(wavy, data, {"pgd": attack})
        assert torch.equal(report.attacks["pgd"].fell, attack.run(*data).success)


def test_a_journal_goes_on_with_the_same_radii_of_elements_alone(tmp_path):
    torch.manual_seed(5)
    x = torch.rand(6, 1, 2, 3)
    data = (x, wavy(x).argmax(1))
    eps = torch.tensor([0.3, 0.0, 0.15])
    bounds = (torch.zeros(3), torch.tensor([1.0, 1.0, 2.0]))

    def run(eps, bounds):
        attacks = {"pgd": PGD(wavy, eps, bounds=bounds)}
        return evaluate(wavy, data, attacks, journal=tmp_path, checks=False)

    first = run(eps, bounds)
    again = run(eps.clone(), (bounds[0].clone(), bounds[1]))
    assert torch.equal(first.attacks["pgd"].fell, again.attacks["pgd"].fell)
    with pytest.raises(JournalError):
        run(eps.flip(0), bounds)
    with pytest.raises(JournalError):
        run(eps, (bounds[0], 2 * bounds[1]))


@pytest.mark.parametrize(
    ("eps", "options", "advice"),
    [
        (8, {}, "write 8 / 255"),
        (torch.tensor([8.0, 4.0]), {}, "write 4 / 255"),
        (2.5, {"bounds": (-1, 1)}, "write 2.5 \\* 2 / 255"),
        (8, {"bounds": (torch.zeros(3, 1, 1), 1.0)}, "write 8 / 255"),
    ],
)
def test_a_radius_in_another_unit_is_said(eps, options, advice):
    with pytest.warns(UserWarning, match=f"reaches across bounds=.*{advice}"):
        PGD(model, eps, **options)


@pytest.mark.filterwarnings("error")
def test_radii_that_the_box_holds_are_not_remarked():
    PGD(model, 1.0)
    PGD(model, torch.tensor([0.1, 4.0]))  # the second image may be any
    PGD(model, 8, bounds=(0, 255))
    images, labels = torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.long)
    PGD(model, 3.4, norm="L2", steps=1).run(images, labels)  # √12 = 3.46
    PGD(model, 11.9, norm="L1", steps=1).run(images, labels)
    DeepFool(model, math.inf)


@pytest.mark.parametrize(("norm", "eps"), [("L2", 3.5), ("L1", 12.1)])
def test_how_far_the_corners_of_the_box_are_apart_depends_on_the_images(norm, eps):
    data = torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.long)
    attack = PGD(model, eps, norm=norm, steps=1)
    for run in (lambda: attack.run(*data), lambda: evaluate(model, data, [attack])):
        with pytest.warns(UserWarning, match=f"eps={eps:g} reaches across"):
            run()


def test_an_ensemble_says_it_once():
    with pytest.warns(UserWarning, match="eps=8 reaches across") as said:
        assert len(AutoAttack(model, eps=8).stages) == 4
    assert len(said) == 1


def test_radii_of_an_evaluation_in_another_unit_are_said():
    data = torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.long)
    with pytest.warns(UserWarning, match="eps=8 reaches across"):
        evaluate(model, data, [PGD(model, 8 / 255, steps=1)], eps=[8 / 255, 8.0])
