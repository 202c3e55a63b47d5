"""Images that influence each other are attacked together, in groups that stay what they are."""

import copy

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import FGSM, MIFGSM, PGD, AuxiliaryLoss, Square, evaluate
from ironmoe.moe import Capacity
from ironmoe.moe.routers.groups import Grouped

EPS = 0.02


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs()
    return images.double(), labels


@pytest.fixture(scope="module")
def dropless(data):
    return toys.vmoe(data[0].float(), data[1])


@pytest.fixture(scope="module")
def coupled(data):
    return toys.vmoe(data[0].float(), data[1], capacity=Capacity(0.6, images_per_group=3))


def test_the_final_batch_shows_the_verdict(coupled, data):
    for attack in (
        PGD(coupled, EPS, steps=8, restarts=2),
        FGSM(coupled, EPS),
        MIFGSM(coupled, EPS, steps=4),
    ):
        result = attack.run(*data)
        with torch.no_grad():
            assert torch.equal(coupled(result.adversarial).argmax(1), result.prediction)
        assert result.success.any() and not result.success.all()


@pytest.mark.parametrize("batch_size", [10, 60])
def test_groups_stay_together_in_any_batch(coupled, data, batch_size):
    images, labels = data[0][:50], data[1][:50]  # the last group has two images
    attack = PGD(coupled, EPS, steps=6, restarts=2)
    whole = attack.run(images, labels)
    report = evaluate(
        coupled, (images, labels), {"pgd": attack}, batch_size=batch_size, checks=False
    )
    assert torch.equal(report.attacks["pgd"].fell, whole.success)


def test_every_batch_holds_whole_groups(coupled, data):
    sizes = []
    handle = coupled.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    evaluate(coupled, data, {"pgd": PGD(coupled, EPS, steps=6)}, batch_size=20, checks=False)
    handle.remove()
    assert {size % 3 for size in sizes} == {0} and max(sizes) <= 21


def test_attacks_that_accept_image_by_image_are_refused(coupled, data):
    class Picky(PGD):
        takes_groups = False

    with pytest.raises(
        ValueError, match=r"Picky accepts or rejects each image's step by itself.*groups of 3"
    ):
        Picky(coupled, EPS).run(*data)
    with pytest.raises(ValueError, match="Picky accepts"):
        evaluate(coupled, data, {"p": Picky(coupled, EPS)})


class Window(nn.Module):
    """Falls while the first pixel is inside a window; says that it couples pairs of images, as a
    capacity would."""

    def __init__(self):
        super().__init__()
        self.group = Grouped(images_per_group=2)

    def forward(self, x):
        inside = (x[:, 0] > 0.55) & (x[:, 0] < 0.65)
        return torch.stack([torch.full_like(x[:, 0], 0.5), inside + 1e-3 * x[:, 0]], 1)


class Killed(Exception):
    pass


def test_what_fell_at_a_small_radius_stays_fallen():
    """The first of each pair falls at 0.1 and, moved further, no longer at 0.3."""
    model, images = Window(), torch.tensor([[0.5], [0.1]] * 2)
    labels = torch.zeros(4, dtype=torch.int64)
    sweep = evaluate(
        model,
        (images, labels),
        {"f": FGSM(model)},
        eps=[0.1, 0.3],
        checks=False,
        keep_adversarial=True,
    )
    summary = sweep.attacks["f"]
    assert (
        summary.fell.tolist() == [True, False] * 2
        and summary.fell_at.tolist() == [0.1, float("inf")] * 2
    )
    assert (summary.distance[summary.fell] <= 0.1).all()
    alone = evaluate(model, (images, labels), {"f": FGSM(model, 0.1)}, checks=False)
    assert torch.equal(summary.robust_at(0.1), alone.attacks["f"].robust)
    assert torch.equal(model(summary.adversarial).argmax(1) != 0, summary.fell)


def test_a_sweep_is_monotone_and_no_milder_than_its_first_radius_alone(coupled, data):
    eps = [0.005, 0.015, 0.02, 0.03]
    sweep = evaluate(coupled, data, {"p": PGD(coupled, steps=8)}, eps=eps, checks=False).attacks[
        "p"
    ]
    first = evaluate(coupled, data, {"p": PGD(coupled, eps[0], steps=8)}, checks=False).attacks["p"]
    assert torch.equal(sweep.robust_at(eps[0]), first.robust)
    counts = [share.count for share in sweep.curve.values()]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
    fell = sweep.fell
    assert (sweep.distance[fell] <= sweep.fell_at[fell]).all()


def test_a_journal_cut_anywhere_loses_no_member_of_a_group(coupled, data, tmp_path):
    images, labels = data[0][:30], data[1][:30]
    options = {
        "eps": [0.005, 0.015, 0.03],
        "checks": False,
        "batch_size": 12,
        "keep_adversarial": True,
    }
    whole = evaluate(coupled, (images, labels), {"p": PGD(coupled, steps=3)}, **options).attacks[
        "p"
    ]

    def kill(progress):
        if progress.decided > 9:
            raise Killed

    with pytest.raises(Killed):
        evaluate(
            coupled,
            (images, labels),
            {"p": PGD(coupled, steps=3)},
            journal=tmp_path,
            on_progress=kill,
            **options,
        )
    file = tmp_path / "journal-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for cut in (0, 1, 2, 5, 9):
        file.write_bytes(b"".join(lines[: len(lines) - cut]) + lines[-1][:40])
        resumed = evaluate(
            coupled, (images, labels), {"p": PGD(coupled, steps=3)}, journal=tmp_path, **options
        ).attacks["p"]
        for name in ("fell", "passed", "decided", "prediction", "distance", "steps", "adversarial"):
            assert torch.equal(getattr(whole, name), getattr(resumed, name)), (cut, name)


def test_batches_of_the_data_do_not_change_groups_that_are_whole_batches(data):
    """Labels are what the model says in batches of 20, and in no others."""
    model = toys.vmoe(data[0].float(), data[1], capacity=Capacity(0.25))
    images = torch.rand(
        120, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(20)])
        assert not torch.equal(
            labels, torch.cat([model(part).argmax(1) for part in images.split(60)])
        )
    for size in (7, 20, 60):
        batches = list(zip(images.split(size), labels.split(size), strict=True))
        report = evaluate(
            model, batches, {"still": PGD(model, 0.0, steps=4)}, batch_size=20, checks=False
        )
        assert report.clean_correct.all() and not report.attacks["still"].fell.any()


class TestAuxiliaryLoss:
    """A loss of the whole batch: its images are searched together, and each is judged by itself."""

    def test_of_weight_0_it_is_pgd(self, dropless, data):
        options = {"steps": 8, "restarts": 3}
        plain = PGD(dropless, EPS, **options).run(*data)
        beside = PGD(dropless, EPS, routing=AuxiliaryLoss(0.0), **options).run(*data)
        assert torch.equal(plain.success, beside.success) and torch.equal(plain.steps, beside.steps)
        torch.testing.assert_close(plain.adversarial, beside.adversarial, rtol=0, atol=1e-9)
        assert 0 < plain.success.sum() < 120

    def test_another_attack_is_not_changed_by_it(self, dropless, coupled, data):
        data = data[0][:40], data[1][:40]
        for model, batch_size in ((dropless, 16), (coupled, 10)):
            plain = {"pgd": PGD(model, EPS, steps=8, restarts=2)}
            both = plain | {"aux": PGD(model, EPS, steps=4, routing=AuxiliaryLoss())}
            alone = evaluate(model, data, plain, batch_size=batch_size, checks=False)
            beside = evaluate(model, data, both, batch_size=batch_size, checks=False)
            assert torch.equal(alone.clean_correct, beside.clean_correct)
            assert torch.equal(alone.attacks["pgd"].fell, beside.attacks["pgd"].fell)

    def test_misclassified_images_stay_clean(self, dropless, data):
        images, labels = data
        labels = torch.where(torch.arange(120) % 10 == 0, (labels + 1) % 4, labels)
        result = PGD(dropless, EPS, steps=4, routing=AuxiliaryLoss()).run(images, labels)
        wrong = ~result.clean_correct
        assert wrong.any() and torch.equal(result.adversarial[wrong], images[wrong])

    def test_what_is_not_confirmed_goes_on_in_company(self, dropless, data):
        images, labels = data[0].float(), data[1]
        model = copy.deepcopy(dropless).float()
        result = PGD(
            model, EPS, steps=8, attack_dtype=torch.bfloat16, routing=AuxiliaryLoss(0.0)
        ).run(images, labels)
        again = model(result.adversarial).argmax(1) != labels
        assert (
            torch.equal(again & result.clean_correct, result.success)
            and (result.found | ~result.success).all()
        )

    def test_attacks_that_accept_image_by_image_are_refused_by_name(self, dropless, data):
        attack = Square(dropless, EPS, routing=AuxiliaryLoss())
        with pytest.raises(
            ValueError, match=r"which is wrong for AuxiliaryLoss.*a loss that all images share"
        ):
            attack.run(*data)
        alone = {
            "square": Square(dropless, EPS, steps=5),
            "aux": PGD(dropless, EPS, steps=2, routing=AuxiliaryLoss()),
        }
        assert evaluate(dropless, data, alone, checks=False).complete
