"""The sets of cases that stand for a full product."""

from itertools import combinations, product

import pytest
from pairwise import pairwise


@pytest.mark.parametrize(
    "sizes", [(2, 2), (2, 2, 2), (3, 2, 3), (2, 2, 2, 2), (6, 3, 2, 2), (1, 4), (5, 1, 2)]
)
def test_every_two_values_meet_in_fewer_cases_than_the_product(sizes):
    parameters = [
        [f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)
    ]
    rows = pairwise(*parameters)
    assert rows == pairwise(*parameters)
    assert len(set(rows)) == len(rows) and set(rows) <= set(product(*parameters))
    for first, second in combinations(range(len(sizes)), 2):
        met = {(row[first], row[second]) for row in rows}
        assert met == set(product(parameters[first], parameters[second]))

    largest, next_largest = sorted(sizes)[-1], sorted(sizes)[-2]
    assert largest * next_largest <= len(rows) <= len(list(product(*parameters)))
    if len(sizes) == 4:
        assert len(rows) <= len(list(product(*parameters))) / 2


def test_values_need_no_hash():
    assert pairwise([{}], [[1], [2]]) == [({}, [1]), ({}, [2])]
