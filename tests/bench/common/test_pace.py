"""The time that is left follows what was measured."""

import pytest

from ironmoe.bench.common.rows.pace import Pace, in_words


def test_rows_that_take_longer_than_expected_make_the_rest_longer():
    pace = Pace({"a": 1.0, "b": 2.0, "c": 3.0})
    assert pace.seconds_left == 6.0
    pace.note("a", 4.0)
    assert pace.seconds_left == pytest.approx(4 * 5.0)
    pace.note("b", 2.0)
    assert pace.seconds_left == pytest.approx(2 * 3.0)
    pace.note("c", 0.1)
    assert pace.seconds_left == 0


def test_times_are_said_as_people_say_them():
    words = [in_words(seconds) for seconds in (0, 1.2, 89, 91, 5399, 7200)]
    assert words == ["1 s", "1 s", "89 s", "2 min", "90 min", "2.0 h"]
