"""What a run says of the calls that measured it."""

import copy

from ironmoe.bench.common.machine.provenance import provenance
from ironmoe.bench.common.machine.sessions import changes, mixed
from ironmoe.bench.common.run_folder import RunFolder, sessions_of


def with_threads(origin, threads):
    other = copy.deepcopy(origin)
    other["machine"]["threads"] = threads
    return other


def test_another_number_of_threads_code_or_version_is_named():
    made = provenance()
    assert changes(made, made | {"date": "later", "command": "another"}) == []
    more = with_threads(made, made["machine"]["threads"] + 1)
    (change,) = changes(made, more)
    there = made["machine"]["threads"]
    assert change == f"machine.threads: {there} there, {there + 1} now"
    assert changes(made, made | {"code": "abc"})[0].endswith("'abc' now")
    newer = made | {"versions": made["versions"] | {"torch": "9"}}
    assert changes(made, newer)[0].startswith("versions.torch")
    assert changes(made, made | {"commit": "of a page"}) == []

    assert mixed([made, made]) == ""
    assert change in mixed([made, more, made])


def test_a_call_that_measures_nothing_is_no_session(tmp_path):
    path = tmp_path / "run"
    first = RunFolder(path, {"a": 1}, 0)
    first.worked()
    first.worked()
    (session,) = sessions_of(path)

    RunFolder(path, {"a": 1}, 0)
    assert sessions_of(path) == [session]
    RunFolder(path, {"a": 1}, 0).worked()
    assert len(sessions_of(path)) == 2


def test_it_says_that_what_is_there_was_measured_otherwise(tmp_path, monkeypatch):
    path = tmp_path / "run"
    first = RunFolder(path, {"a": 1}, 0)
    assert first.greeting == f"Writing to {path}/"
    first.worked()
    assert RunFolder(path, {"a": 1}, 0).greeting == f"Going on in {path}/"

    made = provenance()
    other = with_threads(made, made["machine"]["threads"] + 1)
    monkeypatch.setattr("ironmoe.bench.common.run_folder.provenance", lambda: other)
    assert "was measured with machine.threads" in RunFolder(path, {"a": 1}, 0).greeting


def test_another_number_of_processes_is_named_but_is_no_other_condition(tmp_path):
    path = tmp_path / "run"
    RunFolder(path, {"a": 1}, 0).worked()  # by a command that does not note them, as older ones
    two = {"processes": 2, "expert_parallel": 1}
    four = {"processes": 4, "expert_parallel": 2}
    begun = RunFolder(path, {"a": 1}, 0, parallel=two)
    assert begun.greeting == f"Going on in {path}/"
    begun.worked()
    assert RunFolder(path, {"a": 1}, 0, parallel=two).greeting == f"Going on in {path}/"
    assert RunFolder(path, {"a": 1}, 0, parallel=four).greeting == (
        f"Going on in {path}/\nWhat is there was measured with expert_parallel: 1 there, 2 now; "
        "processes: 2 there, 4 now."
    )
    assert mixed(sessions_of(path)) == ""
