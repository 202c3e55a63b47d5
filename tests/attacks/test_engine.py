"""The queue: the same verdicts as a plain loop, at less cost, whatever the batch."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks import FGSM, MIFGSM, PGD, Attack, evaluate
from ironmoe.attacks.case import Stage
from ironmoe.attacks.engine import Chunk, Engine
from ironmoe.attacks.lane import Lane
from ironmoe.attacks.random import example_keys
from ironmoe.moe import Capacity

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

EPS = 0.02


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs()
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.vmoe(data[0].float(), data[1])


@pytest.fixture(scope="module")
def coupled(data):
    return toys.vmoe(data[0].float(), data[1], capacity=Capacity(0.6, images_per_group=3))


def plain_pgd(model, images, labels, eps, steps, restarts, seed=0):
    """The textbook loop over the whole batch: every image walks all the way in every restart."""
    fell = torch.zeros_like(labels, dtype=torch.bool)
    right = model(images).argmax(1) == labels
    attack = PGD(model, eps, steps=steps, seed=seed)
    radii = torch.full(labels.shape, eps, dtype=torch.float64)
    ball = attack.ball({"clean": images, "eps": radii})
    for restart in range(restarts):
        x = ball.random_point(example_keys(seed, torch.arange(len(labels)), restart))
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            logits = model(x)
            fell |= logits.argmax(1) != labels
            if step < steps:
                (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), [x])
                x = (x + max(2.5 / steps, 0.1) * eps * grad.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return right & fell, right


@pytest.mark.parametrize("batch_size", [7, 32, 200])
def test_the_verdict_is_that_of_a_plain_loop(model, data, batch_size):
    data = data[0][:60], data[1][:60]
    expected, right = plain_pgd(model, *data, EPS, 8, 2)
    report = evaluate(model, data, {"pgd": PGD(model, EPS, steps=8, restarts=2)}, batch_size=batch_size, checks=False)
    assert torch.equal(report.attacks["pgd"].fell, expected) and torch.equal(report.clean_correct, right)
    assert 5 < expected.sum() < 55


def test_adversarial_images_do_not_depend_on_the_batch_either(model, data):
    data, attack = (data[0][:60], data[1][:60]), PGD(model, EPS, steps=8, restarts=2)
    kept = [
        evaluate(model, data, {"pgd": attack}, batch_size=size, keep_adversarial=True, checks=False).attacks["pgd"]
        for size in (11, 60)
    ]
    torch.testing.assert_close(kept[0].adversarial, kept[1].adversarial, rtol=0, atol=1e-9)
    assert torch.equal(kept[0].steps, kept[1].steps)


def test_the_batch_stays_full_and_each_image_pays_only_for_itself(data):
    images, labels = data
    inner = toys.mlp(images.float(), labels)
    sizes = []

    def model(x):
        sizes.append(len(x))
        return inner(x)

    attack = PGD(model, 0.1, steps=20, restarts=2)
    report = evaluate(model, data, {"pgd": attack}, batch_size=16, checks=False)
    summary = report.attacks["pgd"]
    assert max(sizes) <= 16 and summary.fell.any()
    assert sum(sizes) == summary.forwards
    assert summary.backwards <= 2 * 20 * 120  # restarts × steps of each image at most
    assert sum(size >= 14 for size in sizes[1:]) > 0.4 * len(sizes[1:])


def test_a_larger_radius_is_tried_only_on_what_held(model, data):
    radii = [0.01, 0.02, 0.03]
    attack = PGD(model, steps=10)
    swept = evaluate(model, data, {"pgd": attack}, eps=radii[::-1], checks=False).attacks["pgd"]
    singles = [evaluate(model, data, {"pgd": PGD(model, e, steps=10)}, checks=False).attacks["pgd"] for e in radii]
    falls = torch.zeros(120, dtype=torch.bool)
    for eps, single in zip(radii, singles, strict=True):
        falls |= single.fell  # what fell at a smaller radius counts, also where the larger search missed it
        assert torch.equal(swept.robust_at(eps), swept.clean_correct & ~falls)
    assert swept.forwards < sum(s.forwards for s in singles)
    assert list(swept.curve) == radii and [p.count for p in swept.curve.values()] == sorted(
        [p.count for p in swept.curve.values()], reverse=True
    )


class Stepped(Attack):
    """Asks about the clean image ``steps`` times; misclassification is decided by the model below, by attempt."""

    def __init__(self, model, steps=3, restarts=5):
        super().__init__(model, 1.0)
        self.queries, self.restarts, self.gradient = steps, restarts, False

    def start(self, rows):
        # attempt a marks its images with the value a / 10 through the key, which is all a row knows of it
        keys = torch.stack([example_keys(self.seed, torch.arange(8), a) for a in range(self.restarts)])
        attempt = (keys[:, :, None] == rows["key"]).any(1).to(torch.float64).argmax(0)
        rows["point"] = (attempt / 10)[:, None].expand_as(rows["clean"]).clone()

    def advance(self, rows, logits, loss, grad):
        rows["finished"] = rows["queries"] >= self.queries


def test_a_success_cancels_later_siblings_and_waits_for_earlier_ones():
    """Attempts 2 and 4 succeed at once, the earlier ones never: siblings run side by side in a batch with room."""
    asked = []

    def model(x):
        asked.append(x[:, 0].tolist())
        hit = ((x[:, 0] - 0.2).abs() < 0.01) | ((x[:, 0] - 0.4).abs() < 0.01)
        return torch.stack([torch.ones_like(x[:, 0]), 2.0 * hit], 1)

    images, labels = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    report = evaluate(model, (images, labels), {"s": Stepped(model)}, batch_size=8, keep_adversarial=True, checks=False)
    summary = report.attacks["s"]
    assert summary.fell.all() and torch.allclose(summary.adversarial, torch.full((1, 3), 0.2, dtype=torch.float64))
    assert max(len(points) for points in asked) > 1  # side by side
    alone = evaluate(
        model, (images, labels), {"s": Stepped(model, restarts=3)}, batch_size=1, keep_adversarial=True, checks=False
    )
    assert torch.equal(alone.attacks["s"].adversarial, summary.adversarial)


def test_what_is_not_confirmed_goes_on():
    """The search's model is wrong about every image from the second step on; the full-precision one falls at the fourth."""

    class Fragile(torch.nn.Module):
        def forward(self, x):
            moved = x[:, :1]
            limit = 0.15 if torch.is_autocast_enabled("cpu") else 0.35
            return torch.cat([torch.full_like(moved, limit), moved], 1)

    images, labels = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
    options = {"alpha": 0.1, "random_start": False, "attack_dtype": torch.bfloat16}
    result = PGD(Fragile(), 0.5, steps=6, **options).run(images, labels)
    assert result.success.all() and (result.adversarial[:, 0] > 0.35).all() and (result.adversarial[:, 0] < 0.45).all()
    # Questions at 0, .1, .2, .3, .4; of those .2 and .3 found and not confirmed, .4 confirmed; and the clean image.
    assert (result.forwards == 1 + 5 + 3).all() and (result.backwards == 5).all() and (result.steps == 4).all()
    short = PGD(Fragile(), 0.25, steps=6, **options).run(images, labels)
    assert short.found.all() and not short.success.any() and short.robust.all()


class TestCircles:
    def test_they_end_an_attempt_and_change_no_verdict(self):
        weight = torch.randn(2, 10, dtype=torch.float64)

        def model(x):
            return x @ weight.T

        images = torch.rand(40, 10, dtype=torch.float64)
        labels = model(images).argmax(1)
        attack = PGD(model, 0.01, steps=50, alpha=0.003)
        result = attack.run(images, labels)
        attack._circles = False
        plain = attack.run(images, labels)
        assert torch.equal(result.success, plain.success) and not result.success.all()
        held = result.robust
        assert (result.backwards[held] <= 12).all() and (plain.backwards[held] == 50).all()
        torch.testing.assert_close(result.adversarial, plain.adversarial)

    def test_a_point_that_only_nearly_comes_back_is_another_point(self):
        from ironmoe.attacks.cycles import fingerprint

        points = torch.rand(50, 3, 4, dtype=torch.float64)
        points[1] = points[0]
        points[2] = points[0].nextafter(torch.ones(()).double())
        prints = fingerprint(points)
        assert prints[0] == prints[1] and len(set(prints.tolist())) == 49
        swapped = points[0].flatten().flip(0).view(1, 3, 4)
        assert fingerprint(swapped)[0] != prints[0]


class TestGroups:
    def test_the_final_batch_shows_the_verdict(self, coupled, data):
        for attack in (PGD(coupled, EPS, steps=8, restarts=2), FGSM(coupled, EPS), MIFGSM(coupled, EPS, steps=4)):
            result = attack.run(*data)
            with torch.no_grad():
                assert torch.equal(coupled(result.adversarial).argmax(1), result.prediction)
            assert result.success.any() and not result.success.all()

    @pytest.mark.parametrize("batch_size", [10, 60])
    def test_groups_stay_together_in_any_batch(self, coupled, data, batch_size):
        images, labels = data[0][:50], data[1][:50]  # the last group has two images
        attack = PGD(coupled, EPS, steps=6, restarts=2)
        whole = attack.run(images, labels)
        report = evaluate(coupled, (images, labels), {"pgd": attack}, batch_size=batch_size, checks=False)
        assert torch.equal(report.attacks["pgd"].fell, whole.success)

    def test_every_batch_holds_whole_groups(self, coupled, data):
        sizes = []
        handle = coupled.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        evaluate(coupled, data, {"pgd": PGD(coupled, EPS, steps=6)}, batch_size=20, checks=False)
        handle.remove()
        assert {size % 3 for size in sizes} == {0} and max(sizes) <= 21

    def test_attacks_that_accept_image_by_image_are_refused(self, coupled, data):
        class Picky(PGD):
            takes_groups = False

        with pytest.raises(ValueError, match=r"Picky accepts or rejects each image's step by itself.*groups of 3"):
            Picky(coupled, EPS).run(*data)
        with pytest.raises(ValueError, match="Picky accepts"):
            evaluate(coupled, data, {"p": Picky(coupled, EPS)})


class TestBudget:
    @pytest.mark.parametrize("limit", [0, 39, 100, 200, 777])
    def test_forwards_are_never_more(self, model, data, limit):
        made = []
        handle = model.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
        report = evaluate(model, data, {"pgd": PGD(model, EPS, steps=30)}, max_forwards=limit, batch_size=40, checks=False)
        handle.remove()
        assert sum(made) <= limit and (limit < 200 or sum(made) > limit - 80)
        assert not report.complete
        summary = report.attacks["pgd"]
        assert len(summary.decided) <= 120 and bool((~summary.decided).any()) == (limit >= 40)
        assert torch.equal(summary.undecided_at(EPS), summary.clean_correct & ~summary.decided)

    def test_time(self, model, data):
        report = evaluate(model, data, {"pgd": PGD(model, EPS, steps=10000, alpha=0.001)}, max_seconds=0.5, checks=False)
        assert not report.complete
        with pytest.raises(ValueError, match="max_seconds must be at least 0"):
            evaluate(model, data, {"pgd": PGD(model, EPS)}, max_seconds=-1)

    def test_enough_changes_nothing(self, model, data):
        attack = PGD(model, EPS, steps=5)
        free = evaluate(model, data, {"pgd": attack}, checks=False)
        enough = evaluate(model, data, {"pgd": attack}, checks=False, max_forwards=10**6, max_seconds=1000)
        assert free.complete and enough.complete and torch.equal(free.attacks["pgd"].fell, enough.attacks["pgd"].fell)


@pytest.mark.parametrize(
    "make",
    [lambda m: PGD(m, 0.1, steps=4), lambda m: MIFGSM(m, 0.1, steps=4), lambda m: PGD(m, 0.5, steps=4, early_stop=False)],
)
def test_a_round_never_waits_for_the_device(make):
    """On fake tensors whatever needs a value, .item() or a nonzero, raises."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        lane = Lane(make(model), 4, 1, fixed=True)
        images = mode.from_tensor(torch.rand(4, 1, 2, 4))
        labels = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        yes = mode.from_tensor(torch.ones(4, dtype=torch.bool))
        eps = mode.from_tensor(torch.full((4,), 0.1, dtype=torch.float64))
        rows = lane_rows(lane.attack, images, labels, yes, eps)
        lane.rows = rows
        lane.owners = [None] * 4
        shapes = {name: value.shape for name, value in rows.items()}
        for _ in range(6):
            lane.round()
        assert {name: value.shape for name, value in lane.rows.items()} == shapes


def lane_rows(attack, images, labels, yes, eps):
    from ironmoe.attacks.lane import blank_rows

    rows = blank_rows(images, labels, eps, labels, yes, example_keys(0, labels, 0))
    attack.start(rows)
    return rows


def test_a_fixed_batch_gives_the_same_verdicts(model, data):
    """As on a GPU: rows keep their number while units come and go, and flags are read every few rounds."""
    images, labels = data
    attack = PGD(model, EPS, steps=10, restarts=2)
    plain = evaluate(model, data, {"pgd": attack}, checks=False).attacks["pgd"]
    fell = {}

    def emit(case, final):
        if final:
            fell[case.numbers[0]] = case.best is not None and case.best.success[0]

    engine = Engine([[Stage(attack, EPS)]], emit, batch_size=32)
    engine.kind = "cuda"
    for lane in engine.lanes.values():
        lane.fixed = True
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    from ironmoe.attacks.state import borrowed

    attack.victim.image_dtype = torch.float64
    with borrowed(model):
        engine.run([Chunk(images, labels, torch.arange(120))])
    handle.remove()
    assert [fell[i] for i in range(120)] == plain.fell.tolist()
    asked = [size for size in sizes if size in (32, 16, 8, 4, 2, 1)]
    assert len(asked) > 0.6 * len(sizes)
