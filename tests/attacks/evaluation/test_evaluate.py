"""Evaluations that are divided, and streamed."""

import os
import resource
import subprocess
import sys

import pytest
import torch
import toys

from ironmoe.attacks import FGSM, PGD, evaluate
from ironmoe.attacks.evaluation.sharding import Shard

EPS = 0.06


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs()
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


def attacks(model):
    return {"fgsm": FGSM(model, EPS), "pgd": PGD(model, EPS, steps=10, restarts=2)}


PROGRAM = """
import importlib.util, os, sys
import torch, torch.distributed as dist
from ironmoe.attacks import FGSM, PGD, evaluate
spec = importlib.util.spec_from_file_location("toys", sys.argv[1])
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
torch.set_num_threads(1)
child = os.fork()  # so that torch is imported once
store = "file://" + os.path.abspath("store")
dist.init_process_group("gloo", init_method=store, rank=0 if child else 1, world_size=2)
images, labels = toys.blobs()
model = torch.load(sys.argv[4], weights_only=False)
attacks = {"fgsm": FGSM(model, 0.06), "pgd": PGD(model, 0.06, steps=10, restarts=2)}
report = evaluate(model, (images.double(), labels), attacks, checks=False,
                  batch_size=16, keep_adversarial=True, journal=sys.argv[3])
if dist.get_rank() == 0:
    torch.save({name: (s.fell, s.steps, s.adversarial, s.forwards)
                for name, s in report.attacks.items()}, sys.argv[2])
dist.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_processes_find_what_one_finds(model, data, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    toys_file = toys.__file__
    command = [sys.executable, "program.py", toys_file, "out.pt", "journal", "model.pt"]
    torch.save(model, tmp_path / "model.pt")  # another number of threads would train another model
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, timeout=1000)
    found = torch.load(tmp_path / "out.pt")
    alone = evaluate(model, data, attacks(model), checks=False, keep_adversarial=True)
    for name, (fell, steps, adversarial, forwards) in found.items():
        summary = alone.attacks[name]
        assert (
            torch.equal(fell, summary.fell) and torch.equal(steps, summary.steps) and forwards > 0
        )
        torch.testing.assert_close(adversarial, summary.adversarial, rtol=0, atol=1e-6)
    ranks = [len(f.read_text().splitlines()) for f in (tmp_path / "journal").glob("*.jsonl")]
    assert len(ranks) == 2 and min(ranks) > 100  # both had work


def test_shards_divide_exactly():
    indices = torch.arange(23)
    for unit in (1, 3):
        taken = torch.stack([Shard(rank, 4).takes(indices, unit) for rank in range(4)])
        assert (taken.sum(0) == 1).all()
    assert sum(Shard(rank, 4).share(10) for rank in range(4)) == 10


def test_memory_does_not_grow_with_the_data():
    """8,000 images stream through; in flight are as few batches as in a short evaluation before."""
    weight = torch.randn(2304, 3)
    alive = []

    def model(x):
        return (x - 0.5).flatten(1) @ weight

    def stream(batches):
        for batch in range(batches):
            generator = torch.Generator().manual_seed(batch)
            images = torch.rand(250, 1, 48, 48, generator=generator)
            alive.append(images)
            yield images, model(images).argmax(1)
            alive.clear()

    attack = {"fgsm": FGSM(model, 0.004)}
    evaluate(model, stream(8), attack, batch_size=250)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = evaluate(model, stream(32), attack, batch_size=250)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(report.clean_correct) == 8_000 and 0 < report.worst_case.count < 8_000
    # In MiB; the images alone are 70, so that one copy of each, kept in a case, is found.
    assert grown < 40, grown


def test_few_images_are_on_their_way_at_once(model, data):
    """However long the chain, what waits is a few batches."""
    from ironmoe.attacks.engine.queue import Engine

    most = 0
    inner = Engine._collect

    def counting(engine, batch):
        nonlocal most
        inner(engine, batch)
        most = max(most, sum(batch.load for batch in engine.batches.values()) + engine._waiting)

    images, labels = data[0].repeat(5, 1, 1, 1), data[1].repeat(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_collect", counting)
        chain = {f"pgd{i}": PGD(model, steps=3, seed=i) for i in range(3)}
        evaluate(
            model, (images, labels), chain, eps=[0.001, 0.002, 0.003], batch_size=20, checks=False
        )
    assert 20 <= most <= 160, most


def test_attacks_of_the_same_name_are_numbered(model, data):
    same = [PGD(model, EPS), PGD(model, EPS, loss="margin"), PGD(model, EPS, alpha=0.01)]
    report = evaluate(model, data, same, checks=False)
    assert len(report.attacks) == 3 and [name[-3:] for name in list(report.attacks)[1:]] == [
        "(2)",
        "(3)",
    ]


def test_a_radius_named_twice_is_tried_once(model, data):
    once, twice = (
        evaluate(model, data, {"p": PGD(model)}, eps=eps, checks=False)
        for eps in ([0.02], [0.02, 0.02])
    )
    assert once.attacks["p"].forwards == twice.attacks["p"].forwards and twice.attacks["p"].eps == (
        0.02,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 0.03}, TypeError, "eps must be a list of radii"),
        ({"eps": [float("nan")]}, ValueError, "eps must hold at least one radius, none below 0"),
        (
            {"attacks": "one"},
            TypeError,
            "attacks must be name → attack, or a list of attacks, got PGD",
        ),
        ({"attacks": {"pgd": 3}}, TypeError, r"attacks\['pgd'\] must be an attack, got int"),
        (
            {"data": "list"},
            TypeError,
            r"data must be \(images, labels\), or batches of them, got a Tensor as a batch",
        ),
        (
            {"data": "images"},
            TypeError,
            r"data must be \(images, labels\), or batches of them, got Tensor",
        ),
        ({"data": "three"}, TypeError, "got a tuple of"),
        ({"max_seconds": -1}, ValueError, "max_seconds must be at least 0"),
    ],
)
def test_usual_mistakes_are_named(model, data, change, error, message):
    forms = {
        "list": list(data),
        "images": data[0],
        "three": (*data, data[0]),
        "one": PGD(model, EPS),
    }
    arguments = {"data": data, "attacks": {"pgd": PGD(model, EPS)}} | change
    arguments = {
        name: forms.get(value, value) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        evaluate(model, **arguments)


def test_what_was_not_reached_is_counted(model, data):
    for limit, read in ((0, 0), (30, 20)):
        report = evaluate(
            model, data, {"p": PGD(model, EPS)}, max_forwards=limit, batch_size=20, checks=False
        )
        assert (
            len(report.clean_correct) == read
            and report.unread == report.as_dict()["unread"] == 120 - read
        )
    halves = zip(data[0].split(60), data[1].split(60), strict=True)
    streamed = evaluate(
        model, halves, {"p": PGD(model, EPS)}, max_forwards=0, batch_size=20, checks=False
    )
    assert streamed.unread == 0 and not streamed.complete  # nobody knows how many there are
