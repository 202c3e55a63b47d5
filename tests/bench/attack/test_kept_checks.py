"""Checks against false security over several calls of one run."""

from types import SimpleNamespace

import pytest

from ironmoe.attacks import Flag
from ironmoe.bench.attack.saved import checks
from ironmoe.bench.common.run_folder import RunFolder

NAME = "two answers to one image"


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["not looked at", "passed", "not looked at"], ["not looked at", "passed", "passed"]),
        (["passed", "tripped", "passed"], ["passed", "tripped", "tripped"]),
        (["tripped", "not looked at"], ["tripped", "tripped"]),
    ],
)
def test_a_check_that_tripped_stays_so(tmp_path, monkeypatch, states, said):
    monkeypatch.setattr(checks, "check_outcome", lambda report: [])
    folder = RunFolder(tmp_path / "run", {}, 0)

    def call(state):
        flag = Flag(NAME, state == "tripped", 1.0, "why", looked_at=state != "not looked at")
        (kept,) = checks.all_checks(folder, SimpleNamespace(checks=[flag]))
        return kept.state

    assert [call(state) for state in states] == said
