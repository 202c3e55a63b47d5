"""``ironmoe doctor --compile`` prints and keeps each kernel, and goes on."""

import json
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
COMMAND = ["doctor", "--compile", "--chips", "sm_90"]


def run(*arguments):
    return CliRunner().invoke(app, [*COMMAND, *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Three kernels that no compiler sees: a list of those that were compiled, and by whom they are
    compiled."""
    from ironmoe.kernels.compile import report
    from ironmoe.kernels.compile.report import Finding

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = []

    def findings(jobs, pool):
        for chip, number in jobs:
            done.append(number)
            spills = 7 if number == 1 else 0
            yield Finding(chip, f"kernel {number}", "bf16", "", 4, 2, 99, 0, spills, 64, 1, {})

    monkeypatch.setattr(
        report, "jobs_of", lambda chips, only: [("sm_90", n) for n in range(3) if only in "kernel"]
    )
    monkeypatch.setattr(report, "kernel_names", lambda chips: ["scan", "scatter_rows"])
    monkeypatch.setattr(report, "compile_report", findings)
    return done, findings


def test_what_was_compiled_before_ctrl_c_is_not_compiled_again(compiled, tmp_path, monkeypatch):
    done, findings = compiled

    def stops(jobs, pool):
        yield next(findings(jobs, pool))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ironmoe.kernels.compile.report.compile_report", stops)
        stopped = run()
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.output
    assert "kernel 0" in stopped.output and "kernel 1" not in stopped.output

    (file,) = tmp_path.glob("runs/doctor-compile-*/rows.json")
    whole = file.read_text()
    for change in ({"registers": "x"}, {"spills": -1}, {"faults": None}, {"kernel": 3}):
        content = json.loads(whole)
        content["rows"][0] |= change
        file.write_text(json.dumps(content))
        assert "1 row was damaged: measured anew" in run("--only", "kernel").output
        done.clear()
    file.write_text(whole)
    done.append(0)

    result = run("--out", tmp_path / "report.md")
    assert done == [0, 1, 2] and "1 of 3 rows are there" in result.output
    assert all(f"kernel {number}" in result.output for number in range(3))
    assert result.exit_code == 1 and "7 spilling instructions" in result.output
    assert "3 kernels compiled for sm_90" in result.output and "1 faults" in result.output
    text = (tmp_path / "report.md").read_text()
    assert text.count("| kernel ") == 4 and "0, 7" in text
    (file,) = tmp_path.glob("runs/doctor-compile-*/rows.json")
    assert len(json.loads(file.read_text())["rows"]) == 3

    run("--out", tmp_path / "report.md", "--again")
    assert done == [0, 1, 2] * 2 and (tmp_path / "report.md").read_text() == text


def test_a_text_that_is_no_report_is_not_replaced(compiled, tmp_path):
    (tmp_path / "mine.md").write_text("# Mine\n")
    for out, message in (("mine.md", "something else"), ("absent/x.md", "folder that exists")):
        result = run("--out", tmp_path / out)
        assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert (tmp_path / "mine.md").read_text() == "# Mine\n" and compiled[0] == []


def test_a_name_that_no_kernel_has_is_said(compiled):
    result = run("--only", "nothing")
    assert result.exit_code == 2 and "no kernel's name contains 'nothing'" in result.output
    assert "; there are scan, scatter_rows" in result.output
    assert result.output.count("\n") == 1
