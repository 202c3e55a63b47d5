"""What ``--expert-parallel`` says of processes."""

import pytest

from ironmoe.bench.models.expert_parallel import told_groups


@pytest.mark.parametrize(
    ("world", "ranks", "words"),
    [
        (4, 1, ""),
        (2, 2, "2 processes in 1 group, which shares the experts out"),
        (4, 2, "4 processes in 2 groups, each of which shares the experts out"),
    ],
)
def test_groups_in_words(world, ranks, words):
    assert told_groups(world, ranks) == words
