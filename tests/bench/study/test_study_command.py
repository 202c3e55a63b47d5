"""The options of ``ironmoe study``."""

import pytest
from typer.testing import CliRunner

from ironmoe.bench.cli import study as command
from ironmoe.bench.cli.app import app
from ironmoe.bench.study import run
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.measure.table import QUICK, usual_measurements


@pytest.fixture
def asked(monkeypatch):
    """What ``run_study`` is asked to do, in place of doing it."""
    calls = []
    monkeypatch.setattr(
        run, "run_study", lambda options, console, only_plan: calls.append((options, only_plan))
    )
    return calls


def study(*arguments):
    return CliRunner().invoke(app, ["study", "--data", "digits", *arguments])


def test_by_default_everything_is_asked(asked):
    assert study().exit_code == 0
    ((options, only_plan),) = asked
    assert options.arms == tuple(LADDER) and options.trainings == ("standard", "pgd-at")
    assert (options.seeds, options.measurements, only_plan) == (8, usual_measurements(), False)
    assert options.processes >= 1 and options.budget.radii == (2, 4, 8, 16)


def test_quick_is_a_default_that_gives_way(asked):
    assert study("--quick").exit_code == 0
    assert study("--quick", "--seeds", "2", "--arms", "E4,dense", "--plan").exit_code == 0
    (quick, _), (own, only_plan) = asked
    assert (quick.arms, quick.seeds) == (("dense", "E8", "E32"), 3)
    assert quick.trainings == ("standard",) and quick.measurements == QUICK
    assert quick.budget.images == 200
    assert study("--quick", "--images", "1000").exit_code == 0
    assert asked[-1][0].budget.images == 1000  # what is asked for is not cut down
    assert quick.settings == own.settings  # it is a part of the same study
    assert (own.arms, own.seeds, own.measurements) == (("dense", "E4"), 2, QUICK) and only_plan
    assert quick.budget.images < 400


def test_certificates_are_an_option(asked):
    assert study("--certificates").exit_code == study("--quick", "--certificates").exit_code == 0
    (everything, _), (quick, _) = asked
    assert "certificates" not in usual_measurements()
    assert everything.measurements == (*usual_measurements(), "certificates")
    assert quick.measurements == (*QUICK, "certificates")


def test_options_reach_the_study(asked, monkeypatch):
    result = study(
        "--eps", "1,2", "--train-eps", "10", "--epochs", "3", "--images", "50", "--first-seed", "4",
        "--processes", "3", "--measurements", "Curve, CLEAN",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((options, _),) = asked
    assert options.budget.radii == (1, 2) and options.budget.radius == 2
    assert options.budget.images == 50 and options.processes == 3
    assert options.budget.clean_images == 50 and options.budget.swap_images == 25
    assert (options.training.eps_255, options.training.epochs) == (10, 3)
    assert options.measurements == ("clean", "curve") and options.first_seed == 4
    monkeypatch.setattr("ironmoe.bench.study.work.handed_in.pipeline_of_all", lambda models: None)
    assert study("--model", "a=x", "--model", "b=y", "--quick").exit_code == 0
    assert asked[1][0].models == ("a=x", "b=y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "E3"], "--arms must be among dense, E2"),
        (["--trainings", "standart"], "got 'standart'; did you mean standard?"),
        (["--trainings", "free"], "--trainings must be among standard, pgd-at, got 'free'"),
        (["--measurements", "love"], "--measurements must be among clean"),
        (["--seeds", "0"], "must be at least 1, got 0"),
        (["--eps", "0,1"], "must be above 0"),
        (["--eps", "many"], "must be numbers"),
        (["--model", "nameless"], "--model must be NAME@SEED=MODEL"),
        (["--model", "a=b", "--seeds", "3"], "place of the ladder, got --seeds, too"),
        (["--train-eps", "inf"], "must be from 0.01 to 255, got inf"),
        (["--expert-parallel", "2"], "divide the number of processes, got 2 with 1: start the"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, tmp_path):
    result = study(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_torchrun_says_how_many_processes_there_are(asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    result = study("--processes", "2")
    assert result.exit_code == 2 and "got --processes, too" in result.output
    assert study("--expert-parallel", "2").exit_code == 0
    assert asked[0][0].expert_parallel == 2


def test_the_help_names_arms_trainings_and_measurements():
    text = CliRunner().invoke(app, ["study", "--help"], terminal_width=200).output
    for name in ("E8-K4-wide-renorm", "pgd-at", "routed attacks", "NAME@SEED=MODEL"):
        assert name in text, text
    assert command.study.__doc__
