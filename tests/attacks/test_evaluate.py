"""Evaluations that are interrupted, divided, streamed, and looked through for false security."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ironmoe.attacks import FGSM, PGD, JournalError, check_model, evaluate
from ironmoe.attacks.sharding import Shard
from ironmoe.moe import Capacity

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

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


def same(one, two):
    for name, summary in one.attacks.items():
        other = two.attacks[name]
        for field in ("clean_correct", "passed", "fell", "decided", "prediction", "distance", "steps", "found"):
            assert torch.equal(getattr(summary, field), getattr(other, field)), (name, field)
        if summary.adversarial is not None:
            torch.testing.assert_close(summary.adversarial, other.adversarial, rtol=0, atol=1e-9)
    return True


class Killed(Exception):
    pass


class TestJournal:
    @pytest.mark.parametrize("after", [1, 100, 239])
    def test_a_killed_evaluation_goes_on(self, model, data, tmp_path, after):
        options = {"eps": [0.02, EPS], "batch_size": 32, "keep_adversarial": True, "checks": False}
        whole = evaluate(model, data, attacks(model), **options)

        def kill(progress):
            if progress.decided >= after:
                raise Killed

        with pytest.raises(Killed):
            evaluate(model, data, attacks(model), journal=tmp_path / "j", on_progress=kill, **options)
        done = {(line["attack"], line["example"]) for line in lines(tmp_path / "j") if line["decided"]}
        assert len(done) >= after
        again = []
        report = evaluate(model, data, attacks(model), journal=tmp_path / "j", on_progress=again.append, **options)
        assert same(whole, report) and again[0].decided > after - 1
        last = again[-1]
        assert last.decided == last.total == 240 and last.fresh == 240 - len(done) and last.seconds_left == 0
        assert last.images_per_second == last.fresh / 2 / last.seconds  # two attacks
        decided = [(line["attack"], line["example"]) for line in lines(tmp_path / "j") if line["decided"]]
        assert len(decided) == len(set(decided)) == 240  # nothing twice, nothing lost
        finished = evaluate(
            model, data, attacks(model), journal=tmp_path / "j", on_progress=lambda p: pytest.fail("again"), **options
        )
        assert same(whole, finished)

    def test_a_torn_last_line_is_ignored(self, model, data, tmp_path):
        report = evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
        file = tmp_path / "journal-0.jsonl"
        content = file.read_bytes()
        file.write_bytes(content[:-25])
        assert same(report, evaluate(model, data, attacks(model), journal=tmp_path, checks=False))
        assert file.read_bytes().count(b"\n") == content.count(b"\n")

    def test_stages_that_were_passed_are_not_attacked_again(self, model, data, tmp_path):
        seen = []

        def kill(progress):
            seen.append(progress)
            raise Killed

        options = {"eps": [0.001, 0.002, 0.3], "checks": False, "batch_size": 120}
        with pytest.raises(Killed):
            evaluate(model, data, {"pgd": PGD(model, steps=5)}, journal=tmp_path, on_progress=kill, **options)
        passed = {line["example"]: line["passed"] for line in lines(tmp_path)}
        assert max(passed.values()) == 2
        whole = evaluate(model, data, {"pgd": PGD(model, steps=5)}, **options)
        report = evaluate(model, data, {"pgd": PGD(model, steps=5)}, journal=tmp_path, **options)
        assert same(whole, report)
        assert report.attacks["pgd"].backwards == whole.attacks["pgd"].backwards  # what was spent before counts, once

    def test_a_model_with_batch_norm_has_a_journal(self, data, tmp_path):
        """Its count of batches is a tensor without axes."""
        _, labels = data
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(144), torch.nn.Linear(144, 4)).double()
        report = evaluate(model, data, {"fgsm": FGSM(model, EPS)}, journal=tmp_path, checks=False)
        with pytest.raises(JournalError, match="keep_adversarial must be as in the journal"):
            evaluate(model, data, {"fgsm": FGSM(model, EPS)}, journal=tmp_path, keep_adversarial=True)
        model[1].num_batches_tracked += 1
        with pytest.raises(JournalError, match="weights must be as in the journal"):
            evaluate(model, data, {"fgsm": FGSM(model, EPS)}, journal=tmp_path)
        assert len(report.clean_correct) == len(labels)

    def test_another_evaluation_is_refused(self, model, data, tmp_path):
        evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
        with pytest.raises(JournalError, match="attacks must be as in the journal"):
            evaluate(model, data, {"pgd": PGD(model, EPS, steps=11)}, journal=tmp_path)
        other = toys.mlp(data[0].float(), data[1], seed=1)
        with pytest.raises(JournalError, match="weights must be as in the journal"):
            evaluate(other, data, attacks(other), journal=tmp_path)
        with pytest.raises(JournalError, match="got another image 0"):
            evaluate(model, (data[0].flip(0), data[1].flip(0)), attacks(model), journal=tmp_path)
        (tmp_path / "journal-0.jsonl").write_text("nonsense\n")
        with pytest.raises(JournalError, match="must be a journal"):
            evaluate(model, data, attacks(model), journal=tmp_path)


def lines(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()[1:]]


PROGRAM = """
import importlib.util, sys
import torch, torch.distributed as dist
from ironmoe.attacks import FGSM, PGD, evaluate
spec = importlib.util.spec_from_file_location("toys", sys.argv[1])
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
torch.set_num_threads(1)
dist.init_process_group("gloo")
images, labels = toys.blobs()
model = toys.mlp(images, labels)
attacks = {"fgsm": FGSM(model, 0.06), "pgd": PGD(model, 0.06, steps=10, restarts=2)}
report = evaluate(model, (images.double(), labels), attacks, checks=False, batch_size=16, keep_adversarial=True, journal=sys.argv[3])
if dist.get_rank() == 0:
    torch.save({name: (s.fell, s.steps, s.adversarial, s.forwards) for name, s in report.attacks.items()}, sys.argv[2])
dist.destroy_process_group()
"""


def test_two_processes_find_what_one_finds(model, data, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    toys_file = Path(__file__).with_name("toys.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "program.py", toys_file, tmp_path / "out.pt", tmp_path / "journal"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, timeout=200)
    found = torch.load(tmp_path / "out.pt")
    alone = evaluate(model, data, attacks(model), checks=False, keep_adversarial=True)
    for name, (fell, steps, adversarial, forwards) in found.items():
        summary = alone.attacks[name]
        assert torch.equal(fell, summary.fell) and torch.equal(steps, summary.steps) and forwards > 0
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
    """100,000 images stream through; in flight are a few batches."""
    weight = torch.randn(64, 3)
    alive = []

    def model(x):
        return x.flatten(1) @ weight

    def stream():
        for batch in range(200):
            generator = torch.Generator().manual_seed(batch)
            images = torch.rand(500, 1, 8, 8, generator=generator)
            alive.append(images)
            yield images, model(images).argmax(1)
            alive.clear()

    next(stream())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = evaluate(model, stream(), {"fgsm": FGSM(model, 0.02)}, batch_size=500)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(report.clean_correct) == 100_000 and 0 < report.worst_case.count < 100_000
    assert grown < 120, grown  # MiB; the images alone are 25, records 14; a copy of every image in a case would be hundreds


def test_few_images_are_on_their_way_at_once(model, data):
    """However long the chain, what waits is a few batches."""
    from ironmoe.attacks.engine import Engine

    most = 0
    inner = Engine._collect

    def counting(engine, lane):
        nonlocal most
        inner(engine, lane)
        most = max(most, sum(lane.load for lane in engine.lanes.values()) + engine._waiting)

    images, labels = data[0].repeat(5, 1, 1, 1), data[1].repeat(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_collect", counting)
        chain = {f"pgd{i}": PGD(model, steps=3, seed=i) for i in range(3)}
        evaluate(model, (images, labels), chain, eps=[0.001, 0.002, 0.003], batch_size=20, checks=False)
    assert 20 <= most <= 160, most


class TestChecks:
    """Each check has a model that trips it and one that does not."""

    @staticmethod
    def tripped(model, data, **options):
        flags = check_model(PGD(model, EPS, **options), *data)
        return {flag.name for flag in flags if flag.tripped}

    def test_a_plain_model_trips_none(self, model, data):
        assert self.tripped(model, data) == set()
        float32 = toys.mlp(data[0].float(), data[1]).float()
        assert self.tripped(float32, (data[0].float(), data[1])) == set()

    def test_a_v_moe_trips_none(self, data):
        vmoe = toys.vmoe(data[0].float(), data[1])
        assert self.tripped(vmoe, data) == set()

    def test_randomised(self, model, data):
        assert "randomised model" in self.tripped(lambda x: model(x + 0.05 * torch.rand_like(x)), data)

    def test_non_determinism(self, model, data):
        calls = []

        def jittery(x):
            calls.append(1)
            return model(x) * (1 + 1e-9 * (len(calls) % 2))

        assert self.tripped(jittery, data) == {"forward non-determinism"}

    def test_softmax(self, model, data):
        assert "softmax outputs" in self.tripped(lambda x: model(x).softmax(1), data)

    def test_zero_gradients(self, model, data):
        assert "zero gradients" in self.tripped(lambda x: (1e4 * model(x)).float(), data)

    def test_quantised_input(self, model, data):
        def rounded(x):
            return model(x + ((x * 15).round() / 15 - x).detach())

        assert self.tripped(rounded, data) == {"quantised input"}

    def test_batch_dependence(self, model, data):
        assert "batch dependence" in self.tripped(lambda x: model(x - x.mean(0, keepdim=True)), data)
        coupled = toys.vmoe(data[0].float(), data[1], capacity=Capacity(0.5, images_per_group=4))
        assert "batch dependence" in self.tripped(coupled, data)

    def test_routing_gradient(self, data):
        class Blocked(torch.nn.Module):
            """The best expert alone, its gate renormalised to 1: the router's logits do not show in the output."""

            def __init__(self):
                super().__init__()
                self.inner = toys.vmoe(data[0].float(), data[1], router={"renormalize": True}, top_k=1)

            def forward(self, x):
                return self.inner(x)

        assert self.tripped(Blocked(), data) == {"routing gradient blocked"}

    def test_classes(self, data):
        two = toys.mlp(data[0].float(), data[1] % 2)
        from ironmoe.attacks import APGD

        flags = check_model(APGD(two, EPS, targets=9), data[0], data[1] % 2)
        assert {flag.name for flag in flags if flag.tripped} == {"fewer classes than the loss needs"}
        assert all(flag.message for flag in flags)

    def test_loss_still_rising(self, model, data):
        crawling = evaluate(model, data, {"pgd": PGD(model, 0.03, alpha=0.0005, steps=10, random_start=False)})
        settled = evaluate(model, data, {"pgd": PGD(model, 0.02, steps=40)})
        names = [{flag.name for flag in report.checks if flag.tripped} for report in (crawling, settled)]
        assert names == [{"loss still rising at the end"}, set()]

    def test_square_beats_the_gradient(self, model, data):
        from ironmoe.attacks import Square

        def masked(x):
            return model(x.detach() + 0 * x)  # gradients of 0 everywhere

        report = evaluate(masked, data, {"pgd": PGD(masked, 0.15), "square": Square(masked, 0.15, steps=100)})
        tripped = {flag.name for flag in report.checks if flag.tripped}
        assert {"Square beats the gradient attacks", "zero gradients"} <= tripped
        honest = evaluate(model, data, {"pgd": PGD(model, 0.15, steps=20), "square": Square(model, 0.15, steps=100)})
        assert not {flag.name for flag in honest.checks if flag.tripped} & tripped
