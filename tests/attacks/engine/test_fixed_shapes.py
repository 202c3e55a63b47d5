"""Lanes as a GPU has them: rows keep their number, nothing waits for the device, flags are read
every few rounds."""

import copy

import pytest
import torch
import toys
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks import (
    APGD,
    CW,
    FAB,
    MIFGSM,
    PGD,
    AuxiliaryLoss,
    DeepFool,
    FrozenRouting,
    RoutingDivergence,
    Softened,
    Square,
    evaluate,
)
from ironmoe.attacks.engine.active_batch import ActiveBatch
from ironmoe.attacks.engine.attempts import blank_attempts
from ironmoe.attacks.engine.queue import Engine
from ironmoe.attacks.random import example_keys

EPS = 0.02
MASK = torch.tensor([0.1, 0.0, 0.2, 0.1])


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs()
    return images.double(), labels


@pytest.mark.parametrize(
    "make",
    [
        lambda m: PGD(m, 0.1, steps=4),
        lambda m: MIFGSM(m, 0.1, steps=4),
        lambda m: PGD(m, 0.5, steps=4, early_stop=False),
        lambda m: PGD(m, MASK, steps=4),
        lambda m: PGD(m, MASK, steps=4, norm="L1", bounds=(-MASK, 1 + MASK), levels=9),
        lambda m: FAB(m, MASK, steps=4, norm="L2", bounds=(-MASK, 1 + MASK), levels=9),
        lambda m: CW(m, MASK, steps=4),
        lambda m: Square(m, MASK, steps=4),
    ],
)
def test_a_round_never_waits_for_the_device(make):
    """On fake tensors whatever needs a value, .item() or a nonzero, raises."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))
    attack = make(model)
    images = torch.rand(4, 1, 2, 4)
    eps = torch.ones(4, dtype=torch.float64)
    attack.counted({"clean": images, "eps": eps}, images)  # what all images share is made once
    attack.ball({"clean": images, "eps": eps})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = ActiveBatch(attack, 4, 1, fixed=True)
        images = mode.from_tensor(torch.rand(4, 1, 2, 4))
        labels = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        yes = mode.from_tensor(torch.ones(4, dtype=torch.bool))
        eps = mode.from_tensor(torch.full((4,), 0.1, dtype=torch.float64))
        rows = batch_attempts(batch.attack, images, labels, yes, eps)
        batch.attempts = rows
        batch.owners = [None] * 4
        shapes = {name: value.shape for name, value in rows.items()}
        for _ in range(6):
            batch.round()
        assert {name: value.shape for name, value in batch.attempts.items()} == shapes


def batch_attempts(attack, images, labels, yes, eps):
    rows = blank_attempts(images, labels, eps, labels, yes, example_keys(0, labels, 0))
    attack.start(rows)
    return rows


@pytest.fixture(scope="module")
def model(data):
    return toys.vmoe(data[0].float(), data[1])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Evaluations and runs from here on."""
    inner = Engine.__init__

    def outer(self, *args, **options):
        inner(self, *args, **options)
        self.kind = "cuda"

    return lambda: monkeypatch.setattr(Engine, "__init__", outer)


ATTACKS = {
    "pgd": lambda m: PGD(m, EPS, steps=10, restarts=2),
    "pgd, all the way": lambda m: PGD(m, EPS, steps=10, early_stop=False),
    "mifgsm": lambda m: MIFGSM(m, EPS, steps=10),
    "apgd-t": lambda m: APGD(m, EPS, steps=8, targets=3),
    "fab": lambda m: FAB(m, EPS, steps=10),
    "square": lambda m: Square(m, 0.05, steps=30),
    "deepfool": lambda m: DeepFool(m, EPS, norm="Linf"),
    "frozen": lambda m: PGD(m, EPS, steps=10, routing=FrozenRouting()),
    "softened": lambda m: MIFGSM(m, EPS, steps=10, routing=Softened(5)),
    "softened deepfool": lambda m: DeepFool(m, EPS, norm="Linf", routing=Softened(5)),
    "diverge": lambda m: PGD(m, EPS, steps=10, routing=RoutingDivergence(0.5)),
    "auxiliary": lambda m: PGD(m, EPS, steps=10, routing=AuxiliaryLoss(0.0)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_verdicts_are_those_of_the_cpu(model, data, as_on_a_gpu, name):
    """With modes under which the search takes for a success what is none, too: those attempts go on
    from where they stopped."""
    attack, data = {name: ATTACKS[name](model)}, (data[0][:60], data[1][:60])
    plain = evaluate(
        model, data, attack, checks=False, batch_size=24, keep_adversarial=True
    ).attacks[name]
    as_on_a_gpu()
    fixed = evaluate(
        model, data, attack, checks=False, batch_size=24, keep_adversarial=True
    ).attacks[name]
    for field in ("fell", "prediction", "found"):
        assert torch.equal(getattr(plain, field), getattr(fixed, field)), field
    # On a CPU, FAB's check asks for no gradient where it expects a misclassified point. Where the
    # point is none, one more query asks for it.
    more = plain.steps - fixed.steps
    assert not more.any() if name != "fab" else (more >= 0).all()
    apart = (plain.adversarial - fixed.adversarial).abs() > 1e-9
    assert (
        apart.sum() <= 2
        # pixels: the sign of a gradient that is 0 but for rounding, which a batch of another size
        # does otherwise
    )
    assert 0 < plain.fell.sum() < 60


def test_batches_have_few_sizes(model, data, as_on_a_gpu):
    as_on_a_gpu()
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    evaluate(
        model, data, {"pgd": PGD(model, EPS, steps=10, restarts=2)}, checks=False, batch_size=32
    )
    handle.remove()
    asked = [size for size in sizes if size in (32, 16, 8, 4, 2, 1)]
    assert len(asked) > 0.6 * len(sizes)


def test_what_is_not_confirmed_goes_on_from_where_it_was(as_on_a_gpu):
    as_on_a_gpu()
    images, labels = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
    options = {"alpha": 0.1, "random_start": False, "attack_dtype": torch.bfloat16}
    result = PGD(toys.Fragile(), 0.5, steps=6, **options).run(images, labels)
    assert (
        result.success.all()
        and (result.steps == 4).all()
        and (result.adversarial[:, 0] < 0.45).all()
    )
    assert (result.backwards == 5).all()


def test_a_budget_keeps_what_was_found_since_the_flags_were_read(model, data, as_on_a_gpu):
    attack = {"pgd": PGD(model, 0.05, steps=30)}
    as_on_a_gpu()
    report = evaluate(model, data, attack, checks=False, batch_size=40, max_forwards=360)
    assert not report.complete and report.attacks["pgd"].fell.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda m, **o: CW(m, c=1.0, steps=20, search_steps=3, **o),
        lambda m, **o: FAB(m, 0.3, steps=5, early_stop=False, **o),
    ],
)
def test_the_best_point_is_one_that_the_judging_model_confirms(data, model, make):
    """The nearest point that fools another model lies on that model's boundary, where the judging
    one is seldom fooled."""
    images, labels = data[0].float()[:20], data[1][:20]
    model = copy.deepcopy(model).float()
    plain = make(model).run(images, labels)
    assert plain.success.sum() >= 18
    for mode in ({"routing": FrozenRouting()}, {"attack_dtype": torch.bfloat16}):
        result = make(model, **mode).run(images, labels)
        assert result.success.sum() >= 0.9 * plain.success.sum()
        assert torch.equal(
            model(result.adversarial).argmax(1) != labels, result.success | ~result.clean_correct
        )
