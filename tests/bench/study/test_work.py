"""How a study is done: what is kept is found again, what was killed is done by others, and how many
processes there are changes nothing."""

import os
import queue
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from small_study import BUDGET, QUIET, TINY, options, report

from ironmoe.bench.common.durations import in_words
from ironmoe.bench.common.run_folder import OutputError
from ironmoe.bench.study.ladder.training import TrainingSettings
from ironmoe.bench.study.measure.measurement import Outcome
from ironmoe.bench.study.measure.table import all_measurements, usual_measurements
from ironmoe.bench.study.run import run_study
from ironmoe.bench.study.work import processes
from ironmoe.bench.study.work.claimed import claimed
from ironmoe.bench.study.work.estimate import training_passes
from ironmoe.bench.study.work.plan import announcement, make_plan
from ironmoe.bench.study.work.processes import WorkerFailed
from ironmoe.bench.study.work.store import Store
from ironmoe.bench.study.work.tasks import Study
from ironmoe.bench.study.work.worker import TRAINED, Done
from ironmoe.moe import CheckpointError

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def done(few, no_figures, tmp_path_factory):
    """A finished study of two models in one process: its folder and its report."""
    path = tmp_path_factory.mktemp("done")
    threads = torch.get_num_threads()
    run_study(options(few, path), QUIET)
    assert torch.get_num_threads() == threads
    return path, report(path)


def test_a_study_trains_measures_and_judges(done):
    _, found = done
    assert [(run["arm"], run["training"], run["seed"]) for run in found["runs"]] == [
        ("dense", "standard", 0),
        ("E4", "standard", 0),
    ]
    dense, moe = (run["values"] for run in found["runs"])
    assert {"clean", "auc", "pgd@8"} <= set(dense) and "none:clean" not in dense
    assert "drop best, same sum:clean" in moe
    assert {verdict["verdict"] for verdict in found["verdicts"]} <= {"undecided", "not measured"}


def test_a_study_goes_on_with_what_is_left(few, done):
    path, _ = done
    study = Study(options(few, path), path)
    assert make_plan(study).left == {}
    assert "everything is measured" in announcement(study, make_plan(study))

    more = Study(options(few, path, measurements=usual_measurements()), path)
    left = {what for _, what in make_plan(more).left}
    assert TRAINED not in left and "paper" in left and "curve" not in left
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*.json")}
    run_study(options(few, path, measurements=("clean", "expert use")), QUIET)
    again = {file.name for file, when in files.items() if file.stat().st_mtime_ns != when}
    assert again == {"report.json", "sessions.json"}  # and no measurement


@pytest.mark.parametrize("damage", ["cut off", "of another model"])
def test_a_model_file_that_is_not_what_its_name_says_is_to_be_deleted(few, done, tmp_path, damage):
    dense = done[0] / "models" / "dense-standard-seed0.safetensors"
    file = tmp_path / "models" / "e4-standard-seed0.safetensors"
    file.parent.mkdir()
    content = dense.read_bytes()
    file.write_bytes(content[:-10] if damage == "cut off" else content)
    with pytest.raises(CheckpointError, match=r"e4-standard-seed0.*delete the file, and the model"):
        make_plan(Study(options(few, tmp_path), tmp_path))


def test_several_processes_find_the_same_numbers(few, done, tmp_path):
    run_study(options(few, tmp_path / "several", processes=2), QUIET)
    _, one = done
    assert report(tmp_path / "several")["runs"] == one["runs"]


def test_a_folder_of_another_study_is_refused(few, done):
    with pytest.raises(OutputError, match="other settings"):
        run_study(options(few, done[0], training=TINY._replace(epochs=2)), QUIET)


def test_only_a_plan_does_nothing(few, tmp_path):
    console = Console(record=True, width=200)
    run_study(options(few, tmp_path / "plan"), console, only_plan=True)
    text = console.export_text()
    assert "2 models: 2 arms × 1 seed. Left: 2 trainings and 5 measurements, about" in text
    assert "Fewer than 3 seeds give no verdict." in text
    assert "Nothing is written; without --plan" in text and not (tmp_path / "plan").exists()


def test_a_report_of_fewer_models_says_how_many_it_leaves_out(few, tmp_path):
    settings = {"measurements": ("clean",), "trainings": ("standard",)}
    run_study(options(few, tmp_path / "out", **settings), QUIET)
    console = Console(record=True, width=200)
    run_study(options(few, tmp_path / "out", arms=("dense",), **settings), console)
    text = console.export_text()
    assert "The report that was here had 1 model more." in text
    assert "Without an arm with experts every claim is left open." in text


def test_a_process_that_fails_says_why(few, tmp_path):
    told = queue.Queue()
    bad = options(few, tmp_path, training=TINY._replace(batch_size=5000))
    threads = torch.get_num_threads()
    processes._child(bad, tmp_path, told)
    torch.set_num_threads(threads)
    with pytest.raises(WorkerFailed, match=r"must have at least 5000 images .* What was finished"):
        processes._listen([Ended(0)], told, print)


class Ended(NamedTuple):
    """A process that has ended."""

    exitcode: int

    def is_alive(self):
        return False


def test_what_processes_told_is_passed_on_and_a_study_survives_one_of_them():
    told, heard = queue.Queue(), []
    told.put(Done(0, "clean", 1.0, {}))
    processes._listen([Ended(-9), Ended(0)], told, heard.append)
    assert heard == [Done(0, "clean", 1.0, {})]
    with pytest.raises(WorkerFailed, match=r"exit codes -9, -9.*goes on from there"):
        processes._listen([Ended(-9), Ended(-9)], told, heard.append)


def test_a_claim_ends_with_its_process(tmp_path):
    file = tmp_path / "locks" / "model.lock"
    program = (
        "import sys, time; from pathlib import Path\n"
        "from ironmoe.bench.study.work.claimed import claimed\n"
        "with claimed(Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, file], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"True\n"
    with claimed(file) as mine:
        assert not mine

    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with claimed(file) as mine:
        assert mine
        with claimed(file) as again:
            assert not again


def test_processes_end_with_the_one_that_started_them():
    """They hold their parent's pipe, so its end is seen when all are gone."""
    program = (
        "import multiprocessing, time\n"
        "from ironmoe.bench.common.processes import end_with_parent\n"
        "context = multiprocessing.get_context('spawn')\n"
        "child = context.Process(target=end_with_parent)\n"
        "child.start(); print(child.is_alive(), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"True\n"
    os.kill(parent.pid, signal.SIGKILL)
    rest, _ = parent.communicate(timeout=50)
    assert rest == b""


def test_another_machine_can_train_other_seeds(few, tmp_path):
    study = Study(options(few, tmp_path, seeds=2, first_seed=5), tmp_path)
    assert [task.entry.seed for task in study.tasks] == [5, 5, 6, 6]
    assert study.options.settings == options(few, tmp_path).settings


def test_what_is_kept_is_found_by_model_images_and_settings(tmp_path):
    what, store = all_measurements()["curve"], Store(tmp_path, "images")
    kept = Outcome({"auc": 0.5, "odd": float("nan")}, {"auc": [0.0, float("nan")]}, ("why",))
    store.write("a" * 64, what, BUDGET, kept, name="dense", seconds=1.5)
    found = store.read("a" * 64, what, BUDGET)
    assert found.values["auc"] == 0.5 and np.isnan(found.values["odd"])
    assert found.images["auc"][0] == 0 and np.isnan(found.images["auc"][1])
    assert found.problems == ("why",)
    assert store.file("a" * 64, what, BUDGET._replace(samples=7)) == store.file(
        "a" * 64, what, BUDGET
    )

    for other in (
        store.file("b" * 64, what, BUDGET),
        store.file("a" * 64, what, BUDGET._replace(steps=9)),
        store.file("a" * 64, all_measurements()["clean"], BUDGET),
        store.file("a" * 64, what._replace(version=99), BUDGET),
        Store(tmp_path, "others").file("a" * 64, what, BUDGET),
    ):
        assert not other.exists()
    other_form = '{"values": [], "images": {}, "problems": [], "seconds": 1.0}'
    for damaged in ("{", "{}", "[]", other_form):
        store.file("a" * 64, what, BUDGET).write_text(damaged)
        assert store.read("a" * 64, what, BUDGET) is None
        assert store.seconds("a" * 64, what, BUDGET) is None


def test_times():
    assert [in_words(s) for s in (0.2, 80, 100, 5000, 7200)] == [
        "1 s", "80 s", "2 min", "83 min", "2.0 h",
    ]  # fmt: skip
    settings = TrainingSettings(epochs=2, steps=4)
    assert training_passes("standard", settings, 100, 10) == 2 * (150 + 100)
    assert training_passes("pgd-at", settings, 100, 10) == 2 * (550 + 100)
