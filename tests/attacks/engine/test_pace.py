"""How long rounds take, from rounds that were measured."""

import pytest

from ironmoe.attacks.engine.budget import Pace


def measured(sizes, *, each_round=3.0, each_pass=0.5):
    """A pace of rounds whose cost is exactly known."""
    pace = Pace()
    for size in sizes:
        pace.add(1, size, each_round + each_pass * size)
    return pace


def test_one_size_bounds_both_costs():
    pace = measured([10])  # 8 seconds
    assert pace.shortest(4, 20) == pytest.approx(2 * 8)
    assert pace.longest(4, 20) == pytest.approx(4 * 8)
    assert pace.longest(4, 80) == pytest.approx(8 * 8)


@pytest.mark.parametrize("order", [(2, 100), (100, 2)])
def test_between_two_sizes_the_costs_of_rounds_and_of_passes_are_known(order):
    pace = measured(order)
    for rounds, forwards in ((10, 20), (10, 500), (7, 700)):
        truth = 3.0 * rounds + 0.5 * forwards
        assert pace.longest(rounds, forwards) == pytest.approx(truth)
        assert pace.likely(rounds, forwards) == pytest.approx(truth)


def test_many_small_rounds_do_not_make_a_full_one_slower():
    pace = measured([100] + [2] * 500)
    assert pace.longest(1, 100) == pytest.approx(3.0 + 0.5 * 100)


def test_what_was_measured_last_counts_most():
    pace = measured([64] * 100)
    for _ in range(20):
        pace.add(1, 64, 100.0)
    assert pace.longest(1, 64) > 95


def test_paces_are_joined_by_calls_and_weight():
    """An attack that asks 4 times for each answer, with gradients that cost 3 passes."""
    joined = Pace()
    joined.join(measured([8]), calls=4, weight=3)
    assert joined.longest(1, 2) == pytest.approx((3.0 + 0.5 * 8) / 4 / 3)


def test_a_round_without_a_pass_is_not_measured():
    pace = Pace()
    pace.add(1, 0, 2.0)
    assert not pace.is_known and pace.seconds == 2.0
