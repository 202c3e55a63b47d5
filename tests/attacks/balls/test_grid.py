"""levels=: what counts lies on a grid, as the pixels of a PNG do."""

import itertools
import math

import pytest
import torch

from ironmoe.attacks import CW, FAB, PGD, AutoAttack, DeepFool, Square, evaluate
from ironmoe.attacks.balls.ball import NORMS, ball_of
from ironmoe.attacks.balls.grid import Grid, grid_of, on_grid

every_norm = pytest.mark.parametrize("norm", NORMS)


def png(images):
    """The images as uint8, and read back."""
    stored = (images * 255).round().to(torch.uint8)
    return stored, stored.float() / 255


def stored_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).float() / 255


@pytest.mark.parametrize("levels", [2, 3, 11, 256, 1024, 65536])
def test_values_between_0_and_1_are_those_of_a_file_read_back(levels):
    level = torch.arange(levels)
    values = Grid(0.0, 1.0, levels).value(level.double())
    assert torch.equal(values.float(), level.float() / (levels - 1))
    assert torch.equal(values, level.double() / (levels - 1))
    assert torch.equal(Grid(0.0, 1.0, levels).nearest(values.float()), level.double())


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 255.0), (-2.1, 2.6)])
def test_values_between_other_bounds(low, high):
    grid = Grid(low, high, 256)
    values = grid.value(torch.arange(256).double())
    assert values[0] == low and values[-1] == high
    torch.testing.assert_close(values, torch.linspace(low, high, 256, dtype=torch.float64))


def best_on_grid(norm, clean_level, point_level, radius, scale):
    """By trying all: of the two levels around each pixel, those in the ball that are nearest to the
    point."""
    sides = [(math.floor(x), math.ceil(x)) for x in point_level]
    order = {"Linf": math.inf, "L2": 2, "L1": 1}[norm]
    best, error = None, math.inf
    for levels in itertools.product(*sides):
        change = torch.tensor(levels, dtype=torch.float64) - clean_level
        if torch.linalg.vector_norm(change / scale, order) <= radius * (1 + 1e-6):
            far = float((torch.tensor(levels) - torch.tensor(point_level)).square().sum())
            if far < error - 1e-9:
                best, error = levels, far
    return best, error


@every_norm
def test_the_grid_point_is_inside_and_near(norm):
    """In Linf and where the nearest one is inside, it is the best; else it is not further away than
    rounding towards the image."""
    torch.manual_seed(0)
    nearest_ones = 0
    for _ in range(40):
        dim = 6
        scale = torch.rand(dim, dtype=torch.float64) * 0.8 + 0.2
        clean_level = torch.randint(20, 230, (1, dim)).double()
        radius = float(torch.rand(())) * {"Linf": 9, "L2": 12, "L1": 25}[norm]
        clean = (clean_level / 255).float()
        eps = torch.tensor([radius / 255], dtype=torch.float64)
        place = (clean.double(), eps, (torch.tensor(0.0), torch.tensor(1.0)), scale)
        rough = ball_of(norm).scaled()(*place)
        point = rough.project(clean.double() + torch.randn(1, dim) * 9 / 255).float()

        grid = grid_of((0.0, 1.0), 256)
        exact = ball_of(norm).scaled()(clean_level / 255, eps * (1 + 1e-6), *place[2:])
        found = on_grid(point, clean, exact, grid)
        level = (found * 255).round().double()
        assert torch.equal(found, level.float() / 255)
        assert exact.distance(level / 255) <= exact.eps
        assert torch.equal(on_grid(found, clean, exact, grid), found)

        wanted = (point.double() * 255)[0].tolist()
        best, error = best_on_grid(norm, clean_level[0], wanted, radius, scale)
        far = float((level[0] - torch.tensor(wanted)).square().sum())
        inner = torch.where(point > clean, (point * 255).floor(), (point * 255).ceil())
        towards = float((inner[0].double() - torch.tensor(wanted)).square().sum())
        assert far <= towards + 1e-6
        is_nearest = best == tuple(round(x) for x in wanted)
        nearest_ones += is_nearest
        if is_nearest or norm == "Linf":
            assert far <= error + 1e-6
    assert 3 < nearest_ones < 40 or norm == "Linf"


@pytest.mark.parametrize(
    "steps, dtype",
    [(1, torch.float32), (4, torch.float64), (8, torch.float32), (13, torch.float32)],
)
def test_a_radius_of_whole_steps_reaches_them(steps, dtype):
    """Although float32 pixels 8 steps apart often differ by a little more than 8 / 255."""
    x = stored_images(10, 3, 8, 8).to(dtype)
    x = (x * 255).round() / 255
    weight = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(1), dtype=dtype)

    def model(at):
        score = at.flatten(1) @ weight.to(at.dtype)
        return torch.stack([score, -score], 1)

    labels = model(x).argmax(1)
    for eps in (steps / 255, torch.tensor(steps / 255), torch.full((3, 1, 1), steps / 255)):
        attack = PGD(model, eps, steps=30, levels=256, early_stop=False, loss="margin")
        result = attack.run(x, labels)
        before, after = png(x)[0].int(), png(result.adversarial)[0].int()
        upwards = (weight > 0).view(3, 8, 8) == (labels == 1).view(-1, 1, 1, 1)
        wanted = torch.where(upwards, before + steps, before - steps).clamp(0, 255)
        assert torch.equal(after, wanted)
        assert (result.distance <= torch.as_tensor(eps, dtype=torch.float64).max()).all()
        torch.testing.assert_close(result.distance, torch.full_like(result.distance, steps / 255))


@pytest.mark.parametrize("kind", [FAB, DeepFool, CW])
def test_nothing_is_lost_after_the_search(kind):
    """What the search found is what the prediction confirms, and a PNG read back is the same
    success. A plain rounding afterwards loses some of what is found without a grid."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 24), torch.nn.GELU(), torch.nn.Linear(24, 4)
    )
    x = stored_images(80, 3, 4, 4, seed=3)
    labels = model(x).argmax(1)
    options = {"norm": "L2", "eps": 0.5}
    if kind is CW:
        options |= {"steps": 40, "search_steps": 4}

    plain = kind(model, **options).run(x, labels)
    rounded = png(plain.adversarial)[1]
    lost = plain.success & (model(rounded).argmax(1) == labels)
    assert lost.sum() > 2 or kind is CW

    result = kind(model, **options, levels=256).run(x, labels)
    assert torch.equal(result.found, result.success)
    assert result.success.sum() > 0.9 * plain.success.sum()
    stored, again = png(result.adversarial)
    assert torch.equal(again, result.adversarial)
    assert torch.equal(model(again).argmax(1) != labels, result.success)
    steps = (stored.double() - png(x)[0].double()) / 255
    assert (steps.flatten(1).norm(dim=1) <= 0.5 * (1 + 1e-9)).all()
    assert (result.distance <= 0.5).all()


def test_masks_and_bounds_of_elements_on_a_grid():
    torch.manual_seed(4)
    weight = torch.randn(12, dtype=torch.float64)

    def model(at):
        score = at.flatten(1).double() @ weight - middle
        return torch.stack([score, -score], 1)

    low = torch.tensor([[[-1.0]], [[0.0]], [[2.0]]], dtype=torch.float64)
    high = torch.tensor([[[1.0]], [[1.0]], [[2.0]]], dtype=torch.float64)
    level = torch.randint(0, 11, (30, 3, 2, 2))
    x = (low + level * (high - low) / 10).float()
    middle = (x.flatten(1).double() @ weight).median() + 1e-3
    labels = model(x).argmax(1)
    eps = torch.rand(3, 2, 2) * (torch.rand(3, 2, 2) < 0.7)
    for norm in NORMS:
        attack = PGD(model, 2 * eps, norm=norm, bounds=(low, high), levels=11, steps=20)
        result = attack.run(x, labels)
        assert result.success.any()
        change = result.adversarial - x
        assert not change[(eps == 0).expand_as(x)].any() and not change[:, 2].any()
        steps = (result.adversarial - low)[:, :2] / ((high - low) / 10)[:2]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        assert (result.distance <= 2 * eps.max().double()).all()


def test_an_evaluation_on_a_grid_and_its_images(tmp_path):
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    x = stored_images(10, 3, 4, 4, seed=6)
    data = (x, model(x).argmax(1))
    attacks = {
        "pgd": PGD(model, levels=256, steps=10),
        "aa": AutoAttack(
            model, version="custom", attacks_to_run=["apgd-t", "fab-t", "square"], levels=256
        ),
    }
    stages = attacks["aa"].stages
    assert all(stage.levels == 256 for stage in stages)
    stages[0].steps = stages[1].steps = 5
    stages[2] = Square(model, levels=256, steps=20)
    report = evaluate(
        model, data, attacks, eps=[2 / 255, 12 / 255], keep_adversarial=True,
        journal=tmp_path, batch_size=6,
    )  # fmt: skip
    for summary in report.attacks.values():
        assert summary.fell.any()
        stored, again = png(summary.adversarial)
        assert torch.equal(again, summary.adversarial)
        change = (stored.int() - png(x)[0].int()).abs().flatten(1).amax(1)
        at = summary.fell_at * 255
        assert (change[summary.fell] <= at[summary.fell] + 1e-6).all()
        fooled = model(again).argmax(1) != data[1]
        assert torch.equal(fooled[summary.fell], torch.ones_like(fooled[summary.fell]))


def test_images_off_the_grid_and_bad_levels_are_named():
    def model(at):
        return at.flatten(1)[:, :2]

    x = stored_images(6, 4)
    labels = model(x).argmax(1)
    PGD(model, 0.1, levels=256).run(x * (1 + 1e-7), labels)  # rounding
    off = x.clone()
    off[3, 2] += 0.3 / 255
    with pytest.raises(ValueError, match=r"grid of levels=256, got a pixel .* 0.00118 off .* 3"):
        PGD(model, 0.1, levels=256).run(off, labels)
    with pytest.raises(ValueError, match="grid of levels=256"):
        evaluate(model, (off, labels), {"pgd": PGD(model, 0.1, levels=256)})
    for levels in (1, 0, -3, 2.5, "256"):
        with pytest.raises(ValueError, match="levels must be None or a whole number"):
            PGD(model, 0.1, levels=levels)
    with pytest.raises(ValueError, match="bounds must be finite for levels=4"):
        PGD(model, 0.1, levels=4, bounds=(0.0, math.inf))
    assert PGD(model, 0.1, levels=256).run(x[:0], labels[:0]).adversarial.shape == (0, 4)


def test_levels_are_a_setting_of_a_journal_only_if_they_are_given(tmp_path):
    def model(at):
        return at.flatten(1)[:, :2]

    assert "levels" not in PGD(model, 0.1).chosen_settings()
    assert PGD(model, 0.1, levels=8).chosen_settings()["levels"] == 8
    assert "levels=8" in PGD(model, 0.1, levels=8).search
