"""Attacks on models that rule classes out find what they find with the logits cut off."""

import math

import pytest
import torch
import toys

from ironmoe.attacks import APGD, CW, FAB, FGSM, MIFGSM, PGD, AutoAttack, DeepFool, Square, evaluate

CLASSES = 6
EPS = 0.03
MASKS = [-math.inf, torch.finfo(torch.float32).min, -1e9]


def steps(attack, count=15, **options):
    return lambda model: attack(model, EPS, steps=count, **options)


ATTACKS = {
    "pgd ce": steps(PGD),
    "pgd margin": steps(PGD, loss="margin"),
    "pgd dlr": steps(PGD, loss="dlr"),
    "pgd sigmoid": steps(PGD, loss="sigmoid"),
    "fgsm dlr": lambda model: FGSM(model, EPS, loss="dlr"),
    "mifgsm dlr": steps(MIFGSM, loss="dlr"),
    "apgd ce": steps(APGD),
    "apgd dlr": steps(APGD, loss="dlr"),
    "apgd-t": steps(APGD, targets=9),
    "apgd-t ce": steps(APGD, loss="ce", targets=9),
    "fab-t": steps(FAB),
    "fab": steps(FAB, targets=0),
    "deepfool": steps(DeepFool, norm="Linf"),
    "square": lambda model: Square(model, 0.1, steps=60),
    "cw": lambda model: CW(model, 0.3, steps=20, search_steps=3, c=1),
}


# With two classes there is no DLR. APGD takes the margin, and so does a masked model.
MARGIN_ALONE = {
    "pgd dlr": steps(PGD, loss="margin"),
    "fgsm dlr": lambda model: FGSM(model, EPS, loss="margin"),
    "mifgsm dlr": steps(MIFGSM, loss="margin"),
}


@pytest.fixture(scope="module")
def network():
    images, labels = toys.blobs(120, classes=CLASSES, noise=0.15)
    return toys.mlp(images, labels).float()


@pytest.fixture(scope="module", params=[2, 3, 4])
def left(request):
    """How many classes are possible."""
    return request.param


@pytest.fixture(scope="module")
def data(network, left):
    """Images from pale ones, near a boundary, to clear ones."""
    images, labels = toys.blobs(120, classes=CLASSES, noise=0.15)
    clear = images[labels < left][:40]
    images = 0.5 + torch.linspace(0.02, 1, 40).view(-1, 1, 1, 1) * (clear - 0.5)
    return images, network(images)[:, :left].argmax(1)


def masked(network, left, mask):
    return lambda x: network(x).masked_fill(torch.arange(CLASSES) >= left, mask)


def cut_off(network, left):
    return lambda x: network(x)[:, :left]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ATTACKS)
def test_what_falls_is_what_falls_with_the_logits_cut_off(network, data, left, name, mask):
    plain = cut_off(network, left)
    if left == 2 and name in MARGIN_ALONE:
        expected = MARGIN_ALONE[name](plain).run(*data).success
    else:
        expected = ATTACKS[name](plain).run(*data).success
    result = ATTACKS[name](masked(network, left, mask)).run(*data)
    assert 5 < int(expected.sum()) < 35
    assert torch.equal(result.success, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_autoattack_and_targeted_attacks_do_the_same(network, data, left, mask):
    images, labels = data
    options = {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t"]}
    targets = (labels + 1) % left
    found = []
    for model in (cut_off(network, left), masked(network, left, mask)):
        attack = AutoAttack(model, eps=EPS, **options)
        for part in attack.stages:
            part.steps = part.max_queries = 10
        apgd = APGD(model, EPS, steps=10, loss="dlr", targeted=True)
        found.append((attack.run(images, labels).success, apgd.run(images, targets).success))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert 5 < int(found[0][0].sum()) < 35 and int(found[0][1].sum())


@pytest.mark.parametrize("mask", [*MASKS, -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_half_precision(network, data, left, mask, dtype):
    """Its lowest number, where the mask is lower, rules out as well."""
    mask = max(mask, torch.finfo(dtype).min) if math.isfinite(mask) else mask
    for name in ("pgd dlr", "apgd dlr", "apgd-t", "fab-t"):
        if left == 2 and name == "pgd dlr":
            continue
        expected, result = (
            ATTACKS[name](lambda x, model=model: model(x).to(dtype)).run(*data).success
            for model in (cut_off(network, left), masked(network, left, mask))
        )
        assert (expected != result).sum() <= (2 if mask == -1e4 else 0)
        assert 3 < int(expected.sum()) < 37


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ATTACKS)
def test_one_possible_class_holds(network, data, name, mask):
    """Nothing can fall, and nothing breaks."""
    images = data[0][:6]
    model = masked(network, 1, mask)
    report = evaluate(model, (images, torch.zeros(6).long()), {"it": ATTACKS[name](model)})
    assert report.attacks["it"].robust.all() and report.complete


@pytest.mark.parametrize("mask", MASKS)
def test_ruled_out_classes_are_no_targets(network, data, left, mask):
    """They would cost passes and lead nowhere."""
    plain, result = (
        APGD(model, 0.001, steps=5, targets=9).run(*data)
        for model in (cut_off(network, left), masked(network, left, mask))
    )
    assert torch.equal(plain.forwards, result.forwards)
