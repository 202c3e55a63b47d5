"""The journal: interrupted at any moment, an evaluation goes on where it was, with the same
settings and no others."""

import json
import os
import subprocess
import sys

import pytest
import torch
import toys

from ironmoe.attacks import (
    APGD,
    CW,
    FAB,
    FGSM,
    MIFGSM,
    PGD,
    AutoAttack,
    DeepFool,
    FrozenRouting,
    JournalError,
    RoutingDivergence,
    Square,
    evaluate,
)
from ironmoe.attacks.engine.records import COLUMNS, record_from
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.evaluation.journal import Journal

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
        for field in (
            "clean_correct",
            "passed",
            "fell",
            "decided",
            "prediction",
            "distance",
            "steps",
            "found",
        ):
            assert torch.equal(getattr(summary, field), getattr(other, field)), (name, field)
        if summary.adversarial is not None:
            torch.testing.assert_close(summary.adversarial, other.adversarial, rtol=0, atol=1e-9)
    return True


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 100, 239])
def test_a_killed_evaluation_goes_on(model, data, tmp_path, after):
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
    report = evaluate(
        model, data, attacks(model), journal=tmp_path / "j", on_progress=again.append, **options
    )
    assert same(whole, report) and again[0].decided > after - 1
    last = again[-1]
    assert (
        last.decided == last.total == 240
        and last.fresh == 240 - len(done)
        and last.seconds_left == (0, 0)
    )
    assert last.images_per_second == last.fresh / 2 / last.seconds  # two attacks
    decided = [
        (line["attack"], line["example"]) for line in lines(tmp_path / "j") if line["decided"]
    ]
    assert len(decided) == len(set(decided)) == 240  # nothing twice, nothing lost
    finished = evaluate(
        model,
        data,
        attacks(model),
        journal=tmp_path / "j",
        on_progress=lambda p: pytest.fail("again"),
        **options,
    )
    assert same(whole, finished)


def test_a_torn_last_line_is_ignored(model, data, tmp_path):
    report = evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
    file = tmp_path / "journal-0.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-25])
    assert same(report, evaluate(model, data, attacks(model), journal=tmp_path, checks=False))
    decided = [(line["attack"], line["example"]) for line in lines(tmp_path) if line["decided"]]
    assert len(decided) == len(set(decided)) == 240


def test_stages_that_were_passed_are_not_attacked_again(model, data, tmp_path):
    seen = []

    def kill(progress):
        seen.append(progress)
        raise Killed

    options = {"eps": [0.001, 0.002, 0.3], "checks": False, "batch_size": 120}
    with pytest.raises(Killed):
        evaluate(
            model, data, {"pgd": PGD(model, steps=5)}, journal=tmp_path, on_progress=kill, **options
        )
    passed = {line["example"]: line["passed"] for line in lines(tmp_path)}
    assert max(passed.values()) == 2
    whole = evaluate(model, data, {"pgd": PGD(model, steps=5)}, **options)
    report = evaluate(model, data, {"pgd": PGD(model, steps=5)}, journal=tmp_path, **options)
    assert same(whole, report)
    # what was spent before counts, once
    assert report.attacks["pgd"].backwards == whole.attacks["pgd"].backwards


def test_a_model_with_batch_norm_has_a_journal(data, tmp_path):
    """Its count of batches is a tensor without axes."""
    _, labels = data
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(144), torch.nn.Linear(144, 4)
    ).double()
    report = evaluate(model, data, {"fgsm": FGSM(model, EPS)}, journal=tmp_path, checks=False)
    with pytest.raises(JournalError, match="keep_adversarial must be as in the journal"):
        evaluate(model, data, {"fgsm": FGSM(model, EPS)}, journal=tmp_path, keep_adversarial=True)
    model[1].num_batches_tracked += 1
    with pytest.raises(JournalError, match="model must be as in the journal"):
        evaluate(model, data, {"fgsm": FGSM(model, EPS)}, journal=tmp_path)
    assert len(report.clean_correct) == len(labels)


def test_another_evaluation_is_refused(model, data, tmp_path):
    evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
    with pytest.raises(JournalError, match="attacks must be as in the journal"):
        evaluate(model, data, {"pgd": PGD(model, EPS, steps=11)}, journal=tmp_path)
    other = toys.mlp(data[0].float(), data[1], seed=1)
    with pytest.raises(JournalError, match="model must be as in the journal"):
        evaluate(other, data, attacks(other), journal=tmp_path)
    with pytest.raises(JournalError, match="got another image or label 0"):
        evaluate(model, (data[0].flip(0), data[1].flip(0)), attacks(model), journal=tmp_path)
    (tmp_path / "journal-0.jsonl").write_text("nonsense\n")
    with pytest.raises(JournalError, match="must be a journal"):
        evaluate(model, data, attacks(model), journal=tmp_path)


PROGRAM = """
import importlib.util, os, signal, sys, time
from pathlib import Path
import torch
from ironmoe.attacks import PGD, evaluate
spec = importlib.util.spec_from_file_location("toys", sys.argv[1])
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
torch.set_num_threads(1)
images, labels = toys.blobs(60)
model = torch.load(sys.argv[4], weights_only=False)

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model

    def forward(self, x):
        time.sleep(0.004)
        return self.inner(x)

def size():
    return sum(file.stat().st_size for file in Path(sys.argv[2]).glob("*"))

for _ in range(2):  # a fork each, so that torch is imported once
    before, child = size(), os.fork()
    if not child:
        break
    while size() < before + 12_000 and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not os.path.exists(sys.argv[3])

slow = Slow()
report = evaluate(slow, (images.double(), labels),
                  {"pgd": PGD(slow, 0.06, steps=10, restarts=2)}, eps=[0.02, 0.06], batch_size=8,
                  checks=False, keep_adversarial=True, journal=sys.argv[2])
s = report.attacks["pgd"]
torch.save((s.fell, s.passed, s.steps, s.adversarial), sys.argv[3])
"""


def test_killed_again_and_again_nothing_is_done_twice_or_lost(model, tmp_path):
    """Real processes, two of them killed without warning while they write."""
    (tmp_path / "program.py").write_text(PROGRAM)
    journal, out, trained = tmp_path / "journal", tmp_path / "out.pt", tmp_path / "model.pt"
    torch.save(model, trained)  # another number of threads would train another model
    command = [sys.executable, tmp_path / "program.py", toys.__file__, journal, out, trained]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1000)
    decided = [line["example"] for line in lines(journal) if line["decided"]]
    assert sorted(decided) == list(range(60))
    fell, passed, steps, adversarial = torch.load(out)
    images, labels = toys.blobs(60)
    whole = evaluate(
        model,
        (images.double(), labels),
        {"pgd": PGD(model, 0.06, steps=10, restarts=2)},
        eps=[0.02, 0.06],
        checks=False,
        keep_adversarial=True,
    ).attacks["pgd"]
    assert (
        torch.equal(fell, whole.fell)
        and torch.equal(passed, whole.passed)
        and torch.equal(steps, whole.steps)
    )
    torch.testing.assert_close(adversarial, whole.adversarial, rtol=0, atol=1e-9)


def test_a_finished_journal_asks_the_model_nothing(model, data, tmp_path):
    report = evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
    handle = model.register_forward_pre_hook(lambda module, args: pytest.fail("asked"))
    again = evaluate(model, data, attacks(model), journal=tmp_path, checks=False, max_forwards=0)
    handle.remove()
    assert same(report, again) and again.complete


def test_images_that_were_begun_are_reported_although_nothing_is_decided(model, data, tmp_path):
    """Else a run cut off early would be a report of the images that fall first."""

    def kill(progress):
        raise Killed

    options = {"journal": tmp_path, "checks": False, "batch_size": 40}
    with pytest.raises(Killed):
        evaluate(model, data, attacks(model), on_progress=kill, **options)
    report = evaluate(model, data, attacks(model), max_forwards=0, **options)
    assert len(report.clean_correct) == 40 and not report.complete and report.unread == 80
    for summary in report.attacks.values():
        assert torch.equal(summary.examples, torch.arange(40)) and (~summary.decided).sum() > 30
    # A kill in the middle of the admission: what only one attack knows does not count yet.
    file = tmp_path / "journal-0.jsonl"
    content = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(content[:60]))
    report = evaluate(model, data, attacks(model), max_forwards=0, **options)
    assert {len(summary.examples) for summary in report.attacks.values()} == {59 - 40}


def test_a_small_budget_comes_to_an_end(model, data, tmp_path):
    """Decided images cost nothing when the same call goes on, so each call gets further."""
    whole = evaluate(model, data, attacks(model), checks=False)
    complete = []
    while not any(complete):
        assert len(complete) < 100
        report = evaluate(
            model,
            data,
            attacks(model),
            journal=tmp_path,
            checks=False,
            max_forwards=900,
            batch_size=20,
        )
        complete.append(report.complete)
    assert len(complete) > 3 and same(whole, report)


def test_fewer_data_give_a_report_of_those(model, data, tmp_path):
    images, labels = data
    evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
    for few in (
        (images[:10], labels[:10]),
        [(images[:4], labels[:4]), (images[4:10], labels[4:10])],
    ):
        assert (
            len(evaluate(model, few, attacks(model), journal=tmp_path, checks=False).clean_correct)
            == 10
        )


def test_another_label_is_another_evaluation(model, data, tmp_path):
    evaluate(model, data, attacks(model), journal=tmp_path, checks=False)
    with pytest.raises(JournalError, match="got another image or label 0"):
        evaluate(
            model, (data[0], (data[1] + 1) % 4), attacks(model), journal=tmp_path, checks=False
        )


def margin_loss(logits, labels):
    return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


PAIRS = {
    "alpha": (PGD, {"alpha": 0.0}, {}),
    "random_start": (PGD, {"random_start": False}, {}),
    "loss": (PGD, {"loss": "margin"}, {}),
    "a callable": (PGD, {"loss": margin_loss}, {}),
    "early_stop": (PGD, {"early_stop": False}, {}),
    "bounds": (PGD, {"bounds": (0.0, 2.0)}, {}),
    "normalize": (PGD, {"normalize": ((0.0,), (1.0,))}, {}),
    "logits_fn": (PGD, {"logits_fn": torch.clone}, {}),
    "attack_dtype": (PGD, {"attack_dtype": torch.bfloat16}, {}),
    "eot": (PGD, {"eot": 2}, {}),
    "decay": (MIFGSM, {"decay": 0.5}, {}),
    "rho": (APGD, {"rho": 0.5}, {}),
    "p_init": (Square, {"p_init": 0.3}, {}),
    "eta": (FAB, {"eta": 1.2}, {}),
    "alpha_max": (FAB, {"alpha_max": 0.2}, {}),
    "confidence": (CW, {"confidence": 1.0}, {}),
    "overshoot": (DeepFool, {"overshoot": 0.5}, {}),
    "parts": (AutoAttack, {"normalize": ((0.0,), (1.0,))}, {}),
    "weight of a mode": (
        PGD,
        {"routing": RoutingDivergence(0.5)},
        {"routing": RoutingDivergence(0.7)},
    ),
    "mode": (PGD, {"routing": FrozenRouting()}, {"routing": FrozenRouting(gates="fresh")}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_setting_counts(model, name):
    kind, one, other = PAIRS[name]
    described = [json.dumps(describe_attack(kind(model, **options))) for options in (one, other)]
    assert described[0] != described[1]
    again = json.dumps(describe_attack(kind(model, **one)))
    assert again == described[0]


def test_another_setting_is_refused(model, data, tmp_path):
    evaluate(model, data, {"pgd": PGD(model, EPS, alpha=0.0)}, journal=tmp_path, checks=False)
    with pytest.raises(JournalError, match="attacks must be as in the journal"):
        evaluate(model, data, {"pgd": PGD(model, EPS)}, journal=tmp_path, checks=False)


def test_the_same_radii_in_another_order_are_the_same(model, data, tmp_path):
    reports = [
        evaluate(model, data, attacks(model), eps=eps, journal=tmp_path, checks=False)
        for eps in ([0.05, 0.02], [0.02, 0.05, 0.02])
    ]
    assert same(*reports)


def test_running_an_attack_does_not_change_what_describes_it(model, data):
    attack = AutoAttack(model, eps=EPS, version="custom", attacks_to_run=["apgd-ce"])
    before = describe_attack(attack)
    attack.run(*data)
    assert describe_attack(attack) == before


def test_a_model_of_another_structure_is_refused(data, tmp_path):
    """The same weights, routed otherwise."""
    torch.manual_seed(0)
    images, labels = data[0][:8], data[1][:8]
    models = [toys.vmoe(images.float(), labels, top_k=top_k) for top_k in (1, 2)]
    models[1].load_state_dict(models[0].state_dict())
    evaluate(models[0], (images, labels), {"f": FGSM(models[0])}, journal=tmp_path, checks=False)
    with pytest.raises(JournalError, match="model must be as in the journal"):
        evaluate(
            models[1], (images, labels), {"f": FGSM(models[1])}, journal=tmp_path, checks=False
        )


def record(example=0, **fields):
    values = dict.fromkeys(COLUMNS, 0) | {
        "example": example,
        "distance": 0.5,
        "offset": -1,
        "end": -1,
    }
    return record_from(values | fields)


def test_what_a_process_knew_earlier_does_not_overrule_what_another_knows_now(tmp_path):
    """Whatever the order of their files: process 1 was interrupted, process 0 finished alone."""
    for rank, decided in ((1, 0), (0, 1)):
        journal = Journal(tmp_path, {}, rank)
        journal.append([record(decided=decided, passed=decided)], [1], [None])
        journal.close()
    again = Journal(tmp_path, {})
    assert again.records.get(0, 0).decided
    again.close()


def test_a_journal_in_use_is_refused(tmp_path):
    journal = Journal(tmp_path, {})
    with pytest.raises(JournalError, match="must not be in use"):
        Journal(tmp_path, {})
    Journal(tmp_path, {}, rank=1).close()  # another process of the same evaluation
    journal.close()
    Journal(tmp_path, {}).close()


def test_records_whose_images_did_not_reach_the_disk_do_not_count(tmp_path):
    journal = Journal(tmp_path, {})
    for example in range(3):
        journal.append([record(example, decided=1)], [1], [torch.full((4,), float(example))])
    journal.close()
    os.truncate(tmp_path / "images-0.bin", 40)
    again = Journal(tmp_path, {})
    assert [again.records.get(0, example) is not None for example in range(3)] == [
        True,
        True,
        False,
    ]
    assert (
        again.image(again.records.get(0, 1), torch.Size([4]), torch.float32).tolist() == [1.0] * 4
    )
    again.close()


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        '[{"example": 1}]',
        '[{"checksum": 1, "what": 2}]',
        "7",
        '{"settings": {}}\n[[1]]',
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, line):
    start = "" if "settings" in line else '{"settings": {}}\n'
    (tmp_path / "journal-0.jsonl").write_text(start + line + "\n")
    if line == "[]":  # no record: nothing is wrong
        Journal(tmp_path, {}).close()
        return
    with pytest.raises(JournalError, match="must be a journal of this program"):
        Journal(tmp_path, {})


def lines(folder):
    """Every record, in the order of writing."""
    return [
        record
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text().splitlines()[1:]
        for record in json.loads(line)
    ]


def test_final_images_may_stay_in_the_journal(tmp_path, model, data):
    """Its files have what memory would have, and a report reads what it is asked for."""
    attack = {"pgd": PGD(model, EPS, steps=3)}
    kept = evaluate(model, data, attack, checks=False, keep_adversarial=True)
    left = evaluate(model, data, attack, checks=False, keep_adversarial="journal", journal=tmp_path)
    whole, lazy = kept.attacks["pgd"], left.attacks["pgd"]
    assert lazy.adversarial is None
    everything = torch.arange(len(whole.examples))
    assert torch.equal(lazy.final(everything), whole.final(everything))
    assert torch.equal(lazy.final(lazy.fell), whole.adversarial[whole.fell])
    assert torch.equal(lazy.final(torch.tensor([3])), whole.adversarial[3:4])
    assert lazy.final(torch.tensor([], dtype=torch.int64)).shape == (0, *data[0].shape[1:])

    with pytest.raises(ValueError, match="keep_adversarial='journal' must come with a journal"):
        evaluate(model, data, attack, keep_adversarial="journal")
    with pytest.raises(ValueError, match="keep_adversarial must be given to read final images"):
        evaluate(model, data, attack, checks=False).attacks["pgd"].final(everything)
