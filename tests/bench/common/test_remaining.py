"""The time that is left follows what was measured."""

import pytest

from ironmoe.bench.common.rows.remaining import Remaining


def test_rows_that_take_longer_than_expected_make_the_rest_longer():
    pace = Remaining({"a": 1.0, "b": 2.0, "c": 3.0})
    assert pace.seconds_left == 6.0
    pace.note("a", 4.0)
    assert pace.seconds_left == pytest.approx(4 * 5.0)
    pace.note("b", 2.0)
    assert pace.seconds_left == pytest.approx(2 * 3.0)
    pace.note("c", 0.1)
    assert pace.seconds_left == 0
