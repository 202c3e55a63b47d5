"""How a study is done: what is kept is found again, what was killed is done by others, and how many
processes there are changes nothing."""

import dataclasses
import json
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

from ironmoe.bench.common.checkpoints import save_checkpoint
from ironmoe.bench.common.data import ImageData, load_data
from ironmoe.bench.common.run_folder import OutputError
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study import run
from ironmoe.bench.study.ladder.arms import Size
from ironmoe.bench.study.ladder.training import TrainingSettings
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome
from ironmoe.bench.study.measure.table import all_measurements, usual_measurements
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.run import run_study
from ironmoe.bench.study.work import processes
from ironmoe.bench.study.work.claimed import claimed
from ironmoe.bench.study.work.estimate import in_words, training_passes
from ironmoe.bench.study.work.handed_in import handed_in, read_option
from ironmoe.bench.study.work.plan import announcement, make_plan
from ironmoe.bench.study.work.processes import WorkerFailed
from ironmoe.bench.study.work.store import Store
from ironmoe.bench.study.work.tasks import Study
from ironmoe.bench.study.work.worker import TRAINED, Done
from ironmoe.moe import CheckpointError, VMoE

QUIET = Console(quiet=True)
TINY = TrainingSettings(
    size=Size(dim=16, depth=2, heads=2, mlp_dim=32, moe_blocks=1), epochs=1, batch_size=20, steps=1
)
BUDGET = Budget(radii=(8.0,), radius=8.0, images=8, routed_images=6, steps=2)


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """They take seconds, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FIGURES", ())
        yield


@pytest.fixture(scope="module")
def few():
    digits = load_data("digits")
    rows = np.concatenate([np.flatnonzero(digits.labels == label)[:25] for label in range(3)])
    return ImageData("few", digits.images[rows], digits.labels[rows], list("012"), [])


def options(few, path, **changes):
    settings = {
        "arms": ("dense", "E4"),
        "trainings": ("standard",),
        "seeds": 1,
        "training": TINY,
        "budget": BUDGET,
        "measurements": ("clean", "curve", "interventions"),
        "out": path,
    }
    return StudyOptions(few, **settings | changes)


def report(path):
    """The numbers, with the values of each run beside its name."""
    found = json.loads((path / "report.json").read_text())
    for place, model in enumerate(found["runs"]):
        columns = found["values"].items()
        model["values"] = {name: row[place] for name, row in columns if row[place] is not None}
    return found


@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
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
    same = [file for file, when in files.items() if file.stat().st_mtime_ns == when]
    assert len(same) == len(files) - 1  # the report alone is written again


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
    assert not list((tmp_path / "plan").rglob("*.safetensors"))


def test_a_process_that_fails_says_why(few, tmp_path):
    told = queue.Queue()
    bad = options(few, tmp_path, training=TINY._replace(batch_size=5000))
    threads = torch.get_num_threads()
    processes._child(bad, tmp_path, told)
    torch.set_num_threads(threads)
    with pytest.raises(WorkerFailed, match=r"must be at most .* got 5000\. What was finished"):
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
        "from ironmoe.bench.study.work.processes import _end_with_parent\n"
        "context = multiprocessing.get_context('spawn')\n"
        "child = context.Process(target=_end_with_parent)\n"
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


def checkpoint(path, seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {
        "image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32,
        "num_classes": 3, "channels": 1, **changes,
    }  # fmt: skip
    model = VMoE(**arguments)
    torch.nn.init.normal_(model.head.weight)
    extra = {
        "name": "own", "seed": seed, "seconds": 1.0, "data": "few", "checksum": "",
        "classes": list("012"),
    }  # fmt: skip
    path.write_bytes(save_checkpoint(model, arguments, extra))
    return model.eval()


def test_models_of_ones_own_are_measured_and_paired(few, tmp_path):
    moe = {"moe_layers": [1], "num_experts": 4, "top_k": 2, "expert_dim": 15}
    texts = []
    for seed in range(3):
        for name, changes in (("dense", {}), ("moe", moe)):
            file = tmp_path / f"{name}{seed}.safetensors"
            checkpoint(file, seed, **changes)
            texts.append(f"{name}@{seed}={file}")
    entries, data = handed_in(tuple(texts), few)
    assert [(e.arm.name, e.arm.experts, e.arm.top_k, e.seed) for e in entries[:2]] == [
        ("dense", 0, 0, 0),
        ("moe", 4, 2, 0),
    ]
    assert not entries[1].arm.equal_width and torch.equal(data.labels, few.labels)

    study = options(few, tmp_path / "own", models=tuple(texts), measurements=("clean", "curve"))
    run_study(study, QUIET)
    found = report(tmp_path / "own")
    assert len(found["runs"]) == 6 and {run["training"] for run in found["runs"]} == {
        "as handed in"
    }
    judged = {verdict["claim"]: verdict for verdict in found["verdicts"]}
    assert judged["equal cost"]["runs"] == 3


MODELS = """
import torch
from ironmoe.moe import CheckpointError, VMoE

class Scaled(torch.nn.Module):
    def __init__(self, scale, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = VMoE(8, 4, 16, 2, 2, 32, 3, moe_layers=[1], num_experts=4, channels=1)
        torch.nn.init.normal_(self.inner.head.weight)
        self.scale, self.how = [scale], how
    def forward(self, x):
        if self.how == "raises":
            raise KeyError("no such thing")
        logits = self.scale[0] * self.inner(x)
        if self.how == "detached":
            return logits.detach()
        return logits * float("nan") if self.how == "nan" else logits

plus, minus = (lambda: Scaled(1.0)), (lambda: Scaled(-1.0))
raises, detached, nan = (lambda how=how: Scaled(1.0, how) for how in ("raises", "detached", "nan"))
"""


@pytest.fixture
def models_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "models_of_ones_own.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("models_of_ones_own", None)


def own(few, tmp_path, names, measurements=("clean",)):
    texts = tuple(f"{name}@{seed}=models_of_ones_own:{name}" for seed, name in enumerate(names))
    asked = options(few, tmp_path / "own", models=texts, measurements=measurements)
    run_study(asked, QUIET)
    return report(tmp_path / "own")


@pytest.mark.usefixtures("models_of_ones_own")
def test_models_that_only_their_code_tells_apart_are_both_measured(few, tmp_path):
    found = own(few, tmp_path, ["plus", "minus"])
    one, other = (run["values"] for run in found["runs"])
    assert one["clean loss"] != other["clean loss"]


@pytest.mark.usefixtures("models_of_ones_own")
def test_a_model_without_a_gradient_is_a_problem_of_its_own(few, tmp_path):
    found = own(few, tmp_path, ["plus", "detached"], ("clean", "derivative"))
    fine, detached = (run["values"] for run in found["runs"])
    assert "r1" in fine and "r1" not in detached and "clean" in detached
    (problem,) = found["problems"]
    assert "derivative of detached" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [("raises", "raises cannot take images"), ("nan", "nan@0 must give .* not finite")],
)
@pytest.mark.usefixtures("models_of_ones_own")
def test_a_model_that_gives_no_logits_is_refused(few, tmp_path, name, message):
    with pytest.raises((UserError, CheckpointError), match=message):
        own(few, tmp_path, [name])


def test_test_images_are_those_of_the_data_whatever_numbers_classes_have(few, tmp_path):
    """A model that counts its classes backwards is asked about the same images."""
    study = Study(options(few, tmp_path), tmp_path)
    images, labels = study._test_images()
    study.data = dataclasses.replace(few, labels=2 - few.labels)
    again, other = study._test_images()
    assert torch.equal(again, images) and torch.equal(other, 2 - labels)


def test_a_model_of_other_flops_is_no_part_of_equal_cost(few, tmp_path):
    checkpoint(tmp_path / "dense.safetensors")
    checkpoint(tmp_path / "wide.safetensors", moe_layers=[1], num_experts=4, top_k=2)
    texts = tuple(f"{name}={tmp_path}/{name}.safetensors" for name in ("dense", "wide"))
    (_, wide), _ = handed_in(texts, few)
    assert wide.arm.equal_width and wide.seed == 0


def test_what_cannot_be_measured_of_a_model_is_said(few, tmp_path):
    """Images of this model influence each other, so that it has no first-order radius."""
    program = (
        "import torch\nfrom ironmoe.moe import Capacity, VMoE\n"
        "def coupled():\n"
        "    torch.manual_seed(0)\n"
        "    model = VMoE(8, 4, 16, 2, 2, 32, 3, moe_layers=[1], num_experts=4, channels=1,\n"
        "                 capacity=Capacity(1.0, images_per_group=2))\n"
        "    torch.nn.init.normal_(model.head.weight)\n"
        "    return model"
    )
    (tmp_path / "coupled_model.py").write_text(program)
    sys.path.insert(0, str(tmp_path))
    try:
        asked = options(
            few,
            tmp_path / "own",
            models=("moe=coupled_model:coupled",),
            measurements=("clean", "derivative"),
        )
        run_study(asked, QUIET)
    finally:
        sys.path.remove(str(tmp_path))
    found = report(tmp_path / "own")
    assert "clean" in found["runs"][0]["values"] and "r1" not in found["runs"][0]["values"]
    (problem,) = found["problems"]
    assert "derivative of moe, as handed in, seed 0: " in problem and "influence" in problem


def test_trainings_of_handed_in_models_are_kept_apart(few, tmp_path):
    checkpoint(tmp_path / "a.safetensors")
    texts = tuple(f"x@1{end}={tmp_path}/a.safetensors" for end in ("", "/pgd-at", "/of ours"))
    entries, _ = handed_in(texts, few)
    assert [entry.training for entry in entries] == ["as handed in", "pgd-at", "of ours"]
    assert {entry.seed for entry in entries} == {1} and len({e.slug for e in entries}) == 3
    with pytest.raises(UserError, match="once, got x@1/pgd-at twice"):
        handed_in((texts[1], texts[1]), few)


@pytest.mark.parametrize(
    "text", ["x", "=file", "name=", "name@=file", "name@one=file", "name@1/=file"]
)
def test_bad_options_for_a_model_are_refused(text):
    with pytest.raises(UserError, match="must be NAME@SEED=MODEL or NAME@SEED/TRAINING=MODEL"):
        read_option(text)


def test_models_that_cannot_be_told_apart_are_refused(few, tmp_path):
    checkpoint(tmp_path / "a.safetensors")
    checkpoint(tmp_path / "b.safetensors", moe_layers=[1], num_experts=4)
    a, b = (f"{tmp_path}/{name}.safetensors" for name in "ab")
    with pytest.raises(UserError, match="once, got x@0 twice"):
        handed_in((f"x@0={a}", f"x={a}"), few)
    with pytest.raises(UserError, match="must be of the same architecture"):
        handed_in((f"x@0={a}", f"x@1={b}"), few)


def test_times():
    assert [in_words(s) for s in (0.2, 80, 100, 5000, 7200)] == [
        "1 s", "80 s", "2 min", "83 min", "2.0 h",
    ]  # fmt: skip
    settings = TrainingSettings(epochs=2, steps=4)
    assert training_passes("standard", settings, 100, 10) == 2 * (150 + 100)
    assert training_passes("pgd-at", settings, 100, 10) == 2 * (550 + 100)
