"""A study under torchrun, whose workers are groups of processes, beside one of one process."""

import json
import math

import pytest
from two_processes import run_in_processes

from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.work.entries import Entry
from ironmoe.bench.study.work.group import WorkGroup, work_group
from ironmoe.bench.study.work.worker import Task, Worker

WORLDS = """
import signal
import numpy as np
from functools import partial
from pathlib import Path
from rich.console import Console
from small_study import options
from worlds import torchrun
from ironmoe.bench.common import processes
from ironmoe.bench.common.errors import clear_errors
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.study import run
from ironmoe.bench.study.measure.subject import Subject

run.FIGURES, processes.GRACE_SECONDS, processes.SAME_SECONDS = (), 0.0, 0.1
# near one picture a class; what reads digits takes seconds to import
numbers = np.random.default_rng(0)
labels = np.repeat(np.arange(3), 25)
images = 0.8 * numbers.random((3, 1, 8, 8))[labels] + 0.2 * numbers.random((75, 1, 8, 8))
few = ImageData("few", torch.from_numpy(images).float(), torch.from_numpy(labels), list("012"), [])

def study(name, size, **changes):
    with open(f"{name}-{os.environ.get('RANK', 0)}.txt", "a") as said:
        console = Console(file=said, quiet=not processes.is_first_process(), width=10_000)
        try:
            changes = {"measurements": MEASURED, **changes}
            run.run_study(options(few, Path(name), expert_parallel=size, **changes), console)
        except Exception as error:
            said.write(f"{type(error).__name__}: {error}")
            raise

MEASURED = ("clean", "expert use", "derivative", "top experts", "interventions", "curve")
"""
MEASURING = """
assert torchrun(1, lambda rank: study("one", 1)) == [0]
for world, size, measured in ((1, 1, MEASURED[:1]), (4, 2, MEASURED[:-1]), (1, 1, MEASURED)):
    went_on = torchrun(world, lambda rank: study("mixed", size, measurements=measured))
    assert went_on == [0] * world
"""
FAILING = """
def dying(rank, own):
    logits, calls = Subject.logits, []
    def logits_or_death(subject, *arguments):
        calls.append(1)
        if own == rank and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return logits(subject, *arguments)
    Subject.logits = logits_or_death
    study(f"killed {rank}", 2, arms=("E4",), measurements=("clean", "interventions"))

for rank in (0, 1):
    assert sorted(torchrun(2, partial(dying, rank))) == [-signal.SIGKILL, 1]

def failing(rank):
    study("failed", 2, training=options(few, "").training._replace(batch_size=5000))

assert torchrun(2, failing) == [1, 1]
"""

PIECES = {
    "dense": ("trained", "clean", "derivative", "curve"),
    "E4": ("trained", "clean", "top experts", "interventions", "curve"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the studies ran that came to their end."""
    folder = tmp_path_factory.mktemp("groups")
    run_in_processes(1, "", folder, before=WORLDS + MEASURING)
    return folder


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Where those ran that did not."""
    folder = tmp_path_factory.mktemp("failures")
    run_in_processes(1, "", folder, before=WORLDS + FAILING)
    return folder


def report(folder, name):
    return json.loads((folder / name / "report.json").read_text())


def may_differ(key, value, rounding):
    """By how much: the roundings of float32 in a chain of 200 terms, which the models are shorter
    than. A divergence of logits that differ by d is p · d² / 2, so an error e of the logits changes
    it by p · d · e, which is at most √(2 · divergence) · e, and by e² / 2. An attack steps the
    other way where a gradient is smaller than its rounding, which moves a pixel of 64.
    """
    error = 2 * rounding(200, max(1.0, value))
    if not key.endswith(":kl"):
        return error
    attacked = value / 2 if key.endswith(":attacked:kl") else 0.0
    return attacked + math.sqrt(2 * value) * error + error**2 / 2


def test_groups_find_what_one_process_finds(folder, rounding):
    """In a study that one process began, two groups went on with, and one process ended."""
    one, other = report(folder, "one"), report(folder, "mixed")
    assert other["runs"] == one["runs"] and len(one["runs"]) == 2
    words = [[verdict["verdict"] for verdict in each["verdicts"]] for each in (one, other)]
    assert words[0] == words[1]
    assert other["values"].keys() == one["values"].keys() > {"pgd@8", "r1", "random:attacked"}
    for key, row in one["values"].items():
        for mine, theirs in zip(row, other["values"][key], strict=True):
            same = mine == theirs
            assert same or abs(mine - theirs) <= may_differ(key, abs(mine), rounding), key


def test_a_group_trains_to_the_bits_of_one_process(folder):
    """Outcomes lie in folders that are named after digests of the weights."""

    def digests(name):
        return {path.name for path in (folder / name / "measured").iterdir()}

    assert digests("one") == digests("mixed")


def test_the_first_process_tells_once_what_each_group_did_and_reports(folder):
    said = (folder / "mixed-0.txt").read_text()
    assert "in 2 groups of 2 processes" in said and said.count("Report: ") == 3
    for arm, measured in PIECES.items():
        for what in measured:
            assert said.count(f"{arm}, standard, seed 0: {what} (") == 1, what
    assert [(folder / f"mixed-{rank}.txt").read_text() for rank in (1, 2, 3)] == [""] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_is_killed_its_group_ends_and_names_it(failures, rank):
    said = (failures / f"killed {rank}-{1 - rank}.txt").read_text().splitlines()[-1]
    assert said.startswith("OtherProcessEnded: ") and "goes on from there" in said
    assert f"rank {rank} (process " in said and " ended. What" in said
    assert list((failures / f"killed {rank}").rglob("clean-*.json"))


def test_when_the_training_fails_one_process_says_why(failures):
    assert "must have at least 5000 images" in (failures / "failed-0.txt").read_text()
    assert "5000" not in (failures / "failed-1.txt").read_text()


@pytest.mark.parametrize("world", [1, 3])
def test_groups_must_divide_the_processes(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    why = f"--expert-parallel must divide the number of processes, got 2 with {world}: start"
    with pytest.raises(UserError, match=why), work_group(2):
        pass


def test_processes_that_see_another_folder_say_so(tmp_path, monkeypatch):
    """They do not train what the first one has trained."""
    monkeypatch.setattr(WorkGroup, "same", lambda group, value, what: value)
    entry = Entry(LADDER["E8"], "standard", 0, tmp_path / "e8.safetensors", pytest.fail)
    worker = Worker(None, tmp_path, None, None, WorkGroup(rank=1, size=2))
    with pytest.raises(UserError, match=r"same folder, got no .*e8.safetensors in process 1"):
        worker._trained(Task(entry, (), None), 0, print)
