"""The experiment of orthogonal clusters: what is known of its numbers."""

import math

import pytest

from ironmoe.attacks.smoothness.bounds.clusters import clusters_experiment


def test_orthogonal_clusters_of_equal_norms_have_the_ratio_root_e():
    for row in clusters_experiment((1, 2, 4, 9), (90,), seeds=(0, 5)):
        assert row.ratio == pytest.approx(math.sqrt(row.experts), rel=1e-12)
        assert row.bound == math.sqrt(row.experts) and row.moe == 1


def test_orthogonal_clusters_of_any_norms_lie_between_1_and_root_e():
    rows = clusters_experiment((2, 4, 8), (90,), seeds=range(20), equal_norms=False)
    assert all(1 <= row.ratio <= row.bound * (1 + 1e-12) for row in rows)
    assert all(row.ratio == pytest.approx(row.dense / row.moe) for row in rows)
    assert min(row.ratio / row.bound for row in rows) < 0.9


@pytest.mark.parametrize("equal_norms", [True, False])
def test_at_every_angle_the_ratio_is_at_least_1_and_within_its_bound(equal_norms):
    rows = clusters_experiment(
        (2, 3, 8), (90, 70, 45, 20, 5, 1), seeds=range(5), equal_norms=equal_norms, points=3, dim=5
    )
    assert all(1 - 1e-9 <= row.ratio <= row.bound * (1 + 1e-9) for row in rows)
    for row in rows:
        expected = math.sqrt(row.experts / (1 - math.cos(math.radians(row.angle))))
        assert row.bound == pytest.approx(expected)
    # outside orthogonality √E is no bound
    assert any(row.ratio > math.sqrt(row.experts) * 1.5 for row in rows)


def test_two_clusters_of_one_point_by_hand():
    """Unit vectors at an angle θ with targets ±1: ‖w‖² = 2 / (1 ± cos θ)."""
    found = {
        round(row.dense**2 * 0.5, 9)
        for row in clusters_experiment((2,), (60,), seeds=range(8), dim=1, points=1)
    }
    assert found == {round(1 / 1.5, 9), round(1 / 0.5, 9)}


def test_draws_are_the_same_for_a_seed_and_rows_come_in_order():
    rows = clusters_experiment((2, 3), (90, 60), seeds=(1, 0))
    assert [(row.experts, row.angle, row.seed) for row in rows] == [
        (e, a, s) for e in (2, 3) for a in (90, 60) for s in (1, 0)
    ]
    assert rows == clusters_experiment((2, 3), (90, 60), seeds=(1, 0))
    assert rows[2].dense != rows[3].dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"angles": (0.5,)}, "angles must be from 1 to 90 degrees, got 0.5"),
        ({"angles": (91,)}, "angles must be from 1 to 90"),
        ({"points": 9}, "points must be at most dim = 8, got 9"),
        ({"experts": (0,)}, "must be at least 1, got 0"),
        ({"seeds": (-1,)}, "must be at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        clusters_experiment(**options)
