"""``python -m ironmoe.bench.benchmarks.gpu`` as a whole, rehearsed on CPU: its files, and that a
kill, a hang or a crash costs what was under way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from ironmoe.bench.benchmarks.gpu import __main__, jobs, process, results
from ironmoe.bench.benchmarks.gpu.report import plan_lines
from ironmoe.bench.benchmarks.gpu.run_log import RunLog
from ironmoe.bench.benchmarks.gpu.tasks import suite
from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.shapes import MAIN, REHEARSAL, ROUTINGS, SHAPES

GATED, BIASES = REHEARSAL


@pytest.fixture
def rehearse(tmp_path, capsys):
    """(exit status, what the JSON and the Markdown file hold, what was said)."""

    def rehearse(*arguments):
        status = __main__.main(
            ["--device", "cpu", "--minutes", "2", "--out", str(tmp_path), *arguments]
        )
        (numbers,), (text,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
        assert not list(tmp_path.glob("*.partial"))
        return status, json.loads(numbers.read_text()), text.read_text(), capsys.readouterr().out

    return rehearse


def test_minutes_cut_from_the_end():
    on_gpu = jobs.plan(SHAPES, 9.0, True, tuple(jobs.KINDS))
    names = [job.name for job in on_gpu]
    assert names[:3] == [f"case {MAIN.name} uniform", "case vmoe-b16-e8 uniform", "tests"]
    assert (
        sum(job.seconds for job in on_gpu[:2]) <= 90
        and sum(job.seconds for job in on_gpu[:3]) <= 240
    )
    cases = [job for job in on_gpu if job.kind == jobs.CASE]
    assert {(job.shape, job.routing) for job in cases} == set(jobs.cases(SHAPES)) and len(
        cases
    ) == len(set(cases))
    assert {routing for shape, routing in jobs.cases(REHEARSAL) if shape == GATED} == set(ROUTINGS)
    lines = plan_lines(on_gpu, 0, 9.0, "a GPU")
    assert "if there is time" in lines[-1] and on_gpu[-1].name in lines[-1] and names[0] in lines[1]


def test_time_that_is_over_is_said(rehearse):
    status, found, text, _ = rehearse("--skip-tests", "--minutes", "0.001")
    assert status == 0 and not found["finished"] and found["rows"] == []
    assert all(
        f"case {shape.name} {routing}" in found["why_not_finished"]
        for shape, routing in jobs.cases(REHEARSAL)
    )
    assert "Not finished: no time for" in text


# A machine that has torch and little else; Python imports a module of this name at every start.
BARE = """
import sys
absent = ("hypothesis", "jinja2", "matplotlib", "mlxtend", "pytest", "rich", "safetensors",
          "sklearn")
sys.modules.update(dict.fromkeys((*absent, "transformers", "triton", "typer")))
"""


def start(tmp_path, *arguments):
    """The program in a process of its own, on a bare machine, once it has written the first
    pass."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    program = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ironmoe.bench.benchmarks.gpu",
            "--device",
            "cpu",
            "--out",
            tmp_path,
            *arguments,
        ],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in tmp_path.glob(f"*{results.RUN_LOG}"):
            if any("rows" in entry for entry in RunLog(path).entries()):
                return program, path
        time.sleep(0.05)
    raise AssertionError("nothing was measured")


def test_a_kill_loses_the_pass_under_way_and_resume_goes_on_to_the_end(rehearse, tmp_path):
    arguments = ("--only", "case", "--shapes", BIASES.name)
    program, path = start(tmp_path, *arguments)
    program.send_signal(signal.SIGKILL)
    program.wait()
    time.sleep(0.5)  # the process of the job ends with it
    there = RunLog(path).entries()
    time.sleep(1.0)
    assert RunLog(path).entries() == there
    rows = [row for entry in there for row in entry.get("rows", ())]
    files = json.loads(path.with_suffix(".json").read_text())
    assert not files["finished"] and files["why_not_finished"] == "still running"

    status, found, text, said = rehearse("--resume", *arguments)
    assert status == 0 and found["finished"] and found["rows"][: len(rows)] == rows
    assert not path.exists() and said.count("forward + full backward: ironmoe") <= 1
    places = [(row["implementation"], row["pass"]) for row in found["rows"]]
    assert (
        len(places) == len(set(places)) and len([name for name, _ in places if name == OURS]) == 9
    )
    assert {row["shape"] for row in found["rows"]} == {BIASES.name} and found["goals"] == []
    assert [job["outcome"] for job in found["jobs"]] == ["done"]
    assert found["versions"]["torch"] and found["device"]["name"] in said
    check_text(text, ("A rehearsal", "## Layers", "## Jobs", "## Notes"))
    # how far the killed one had come depends on the machine
    left = [what for who, what in places[len(rows) :] if who == OURS and "forward" in what]
    measured = [f"{what}: {OURS}" for what in left]
    for words in ("the plan", "[1/1 ", *measured, f"Wrote {tmp_path}"):
        assert words in said


def check_text(text, titles):
    """These are in it, and every table is one."""
    for title in titles:
        assert title in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables and all(len({row.count("|") for row in table}) == 1 for table in tables)


def test_an_interrupted_run_says_so(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("ironmoe.bench.benchmarks.gpu.run.GpuRun._do", interrupt)
    assert (
        __main__.main(
            ["--device", "cpu", "--only", "case", "--shapes", BIASES.name, "--out", str(tmp_path)]
        )
        == 130
    )
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["why_not_finished"].startswith("interrupted; no time for")
    assert "--resume goes on" in capsys.readouterr().out


def test_a_commit_that_leaves_the_code_as_it_is_may_lie_before_resume(tmp_path):
    settings = {"versions": {"torch": "2.13.0", "commit": "aaaa"}, "code": "12ab"}
    RunLog(tmp_path / "a.jsonl").write("run", **settings)
    later = settings | {"versions": {"torch": "2.13.0", "commit": "bbbb-dirty"}}
    assert results._interrupted(tmp_path, later)[1]["code"] == "12ab"
    with pytest.raises(results.ResultsError, match="code: '12ab' there, '34cd' now"):
        results._interrupted(tmp_path, later | {"code": "34cd"})


def test_resume_says_what_differs(rehearse, tmp_path, capsys):
    assert __main__.main(["--device", "cpu", "--resume", "--out", str(tmp_path)]) == 2
    assert "no interrupted run" in capsys.readouterr().err
    rehearse("--only", "bits", "--minutes", "0.001")
    assert (
        __main__.main(["--device", "cpu", "--resume", "--dtype", "float32", "--out", str(tmp_path)])
        == 2
    )
    error = capsys.readouterr().err
    assert "dtype: 'bfloat16' there, 'float32' now" in error and error.count("\n") == 1


CHILD = """
import json, os, signal, sys, time

line = sys.stdin.readline()
if not line:
    sys.exit()
request = json.loads(line)
job = " ".join(part for part in (request["kind"], request["shape"], request["routing"]) if part)

def write(kind, **entry):
    with open(request["run_log"], "a") as file:
        file.write(json.dumps({"kind": kind, "job": job, **entry}) + "\\n")

write("start", part="forward", who=WHO)
if request["routing"] == "half_empty" and WHO not in request["without"]:
    print("its last words")
    sys.stdout.flush()
    if MANNER == "hangs":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGSEGV)
write("part", part="forward", notes=[])
"""


@pytest.fixture
def one_test(tmp_path, monkeypatch):
    """The tests that use the device are one that passes."""
    (tmp_path / "tests" / "device").mkdir(parents=True)
    (tmp_path / "tests" / "device" / "test_it.py").write_text("def test_a(): pass\n")
    monkeypatch.setattr(suite, "TEST_FOLDER", tmp_path / "tests")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "_workers", list)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    one_path = partial(suite.run_suite, paths=("tests/device",))
    monkeypatch.setattr("ironmoe.bench.benchmarks.gpu.run.run_suite", one_path)


@pytest.mark.parametrize("who", ["liger-kernel", OURS])
@pytest.mark.parametrize("manner", ["hangs", "crashes"])
def test_a_hang_or_a_crash_costs_one_case_only(rehearse, one_test, monkeypatch, who, manner):
    """With a child that measures nothing, so that it is quick. A case goes on without a peer that
    was the cause.
    """
    code = CHILD.replace("WHO", repr(who)).replace("MANNER", repr(manner))
    monkeypatch.setattr(process, "CHILD", [sys.executable, "-c", code])
    monkeypatch.setattr(jobs, "OTHER_CASE", (1.0, 1.5))
    monkeypatch.setattr("ironmoe.bench.benchmarks.gpu.run.LEAST", 0.1)
    monkeypatch.setattr("ironmoe.bench.benchmarks.gpu.run.SAY_EVERY", 0.3)
    status, found, text, said = rehearse("--only", "case,tests,bits")
    outcome = {job["job"]: job["outcome"] for job in found["jobs"]}
    broken = f"case {GATED.name} half_empty"
    assert len(outcome) == 7 and outcome["tests"] == "passed"
    assert all(word in ("done", "passed") for job, word in outcome.items() if job != broken)
    assert found["tests"]["counts"] == {"passed": 1}
    check_text(text, ("## Tests on this device", "## Jobs", "## Notes"))
    (note,) = found["notes"]
    assert (
        note["implementation"] == who
        and ("hung" if manner == "hangs" else "SIGSEGV: its last words") in note["why"]
    )
    assert "in forward" in note["why"] and note["why"] in text
    # a word while nothing comes
    assert (f"{broken}: forward of {who} …" in said) == (manner == "hangs")
    goes_on = who != OURS and manner == "crashes"  # a hang has used the time of the case up
    assert outcome[broken] == ("done" if goes_on else "hung" if manner == "hangs" else "died")
    assert status == int(not goes_on) and ("again without liger-kernel" in said) == goes_on


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "nope"], "--shapes: 'nope' not among toy-gated"),
        (["--only", "nope"], "--only must be among case"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--minutes", "0"], "--minutes must be a number above 0"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda"),
    ],
)
def test_bad_options_are_one_line(capsys, tmp_path, arguments, message):
    assert (
        __main__.main(["--device", "cpu", "--skip-tests", "--out", str(tmp_path), *arguments]) == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
