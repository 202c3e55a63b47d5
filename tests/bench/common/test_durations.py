"""Times as people say them."""

from ironmoe.bench.common.durations import in_words, left_in_words, range_in_words


def test_times_are_said_as_people_say_them():
    words = [in_words(seconds) for seconds in (0, 1.2, 89, 91, 5399, 7200)]
    assert words == ["1 s", "1 s", "89 s", "2 min", "90 min", "2.0 h"]
    assert in_words(200_000) == "2 days"


def test_a_range_is_rounded_outwards_and_has_its_units():
    said = {
        (0.2, 0.3): "about 1 s",
        (0, 89): "1 to 89 s",
        (8, 960): "8 s to 16 min",
        (91, 5400): "1 min to 2 h",
        (5400, 7400): "about 2 h",
        (9000, 400_000): "2 h to 5 days",
        (119.6, 3000): "1 to 50 min",
    }
    assert [range_in_words(*ends) for ends in said] == list(said.values())


def test_the_expected_time_comes_before_the_range():
    assert left_in_words((1, 1200), 300) == "about 5 min left (1 s to 20 min)"
    assert left_in_words((1, 1200), None) == "1 s to 20 min left"
    assert left_in_words((700, 730), 715) == "about 12 min left"
