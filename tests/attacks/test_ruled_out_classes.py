"""Attacks on models that rule classes out find what they find with the logits cut off."""

import math

import pytest
import torch
import toys
from pairwise import pairwise

from ironmoe.attacks import APGD, CW, FAB, FGSM, MIFGSM, PGD, AutoAttack, DeepFool, Square, evaluate

CLASSES = 6
EPS = 0.03
COUNT = 20
LEFT = [2, 3, 4]  # how many classes are possible
MASKS = [-math.inf, torch.finfo(torch.float32).min, -1e9]


def steps(attack, count=10, **options):
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
    "square": lambda model: Square(model, 0.1, steps=40),
    "cw": lambda model: CW(model, 0.3, steps=15, search_steps=2, c=1),
}
# Every attack meets every number of classes and every mask.
ROWS = pairwise(list(ATTACKS), LEFT, MASKS)


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


@pytest.fixture(scope="module")
def data(network):
    """The images and labels of so many possible classes: from pale images, near a boundary, to
    clear ones."""
    images, labels = toys.blobs(120, classes=CLASSES, noise=0.15)

    def of(left):
        clear = images[labels < left][:COUNT]
        strength = torch.linspace(0.02, 1, COUNT).view(-1, 1, 1, 1)
        pale = 0.5 + strength * (clear - 0.5)
        return pale, network(pale)[:, :left].argmax(1)

    return {left: of(left) for left in LEFT}


def masked(network, left, mask):
    return lambda x: network(x).masked_fill(torch.arange(CLASSES) >= left, mask)


def cut_off(network, left):
    return lambda x: network(x)[:, :left]


@pytest.mark.parametrize("name", ATTACKS)
def test_what_falls_is_what_falls_with_the_logits_cut_off(network, data, name):
    for _, left, mask in (row for row in ROWS if row[0] == name):
        plain = cut_off(network, left)
        attacks = MARGIN_ALONE if left == 2 and name in MARGIN_ALONE else ATTACKS
        expected = attacks[name](plain).run(*data[left]).success
        result = ATTACKS[name](masked(network, left, mask)).run(*data[left])
        assert 2 < int(expected.sum()) < COUNT - 2
        assert torch.equal(result.success, expected), (left, mask)


@pytest.mark.parametrize(("left", "mask"), list(zip(LEFT, MASKS, strict=True)))
def test_autoattack_and_targeted_attacks_do_the_same(network, data, left, mask):
    images, labels = data[left]
    options = {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t"]}
    targets = (labels + 1) % left
    found = []
    for model in (cut_off(network, left), masked(network, left, mask)):
        attack = AutoAttack(model, eps=EPS, **options)
        for part in attack.stages:
            part.steps = part.max_queries = 5
        apgd = APGD(model, EPS, steps=10, loss="dlr", targeted=True)
        found.append((attack.run(images, labels).success, apgd.run(images, targets).success))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert 2 < int(found[0][0].sum()) < COUNT - 2 and int(found[0][1].sum())


@pytest.mark.parametrize("mask", [*MASKS, -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_half_precision(network, data, mask, dtype):
    """Its lowest number, where the mask is lower, rules out as well."""
    lowest = max(mask, torch.finfo(dtype).min) if math.isfinite(mask) else mask
    for name, left in (("pgd dlr", 3), ("apgd dlr", 2), ("apgd-t", 4), ("fab-t", 3)):
        expected, result = (
            ATTACKS[name](lambda x, model=model: model(x).to(dtype)).run(*data[left]).success
            for model in (cut_off(network, left), masked(network, left, lowest))
        )
        assert (expected != result).sum() <= (1 if mask == -1e4 else 0)
        assert 2 < int(expected.sum()) < COUNT - 2


@pytest.mark.parametrize("name", ATTACKS)
def test_one_possible_class_holds(network, data, name):
    """Nothing can fall, and nothing breaks."""
    images = data[2][0][:4]
    mask = MASKS[list(ATTACKS).index(name) % len(MASKS)]
    model = masked(network, 1, mask)
    report = evaluate(model, (images, torch.zeros(4).long()), {"it": ATTACKS[name](model)})
    assert report.attacks["it"].robust.all() and report.complete


@pytest.mark.parametrize(("left", "mask"), list(zip(LEFT, MASKS, strict=True)))
def test_ruled_out_classes_are_no_targets(network, data, left, mask):
    """They would cost passes and lead nowhere."""
    plain, result = (
        APGD(model, 0.001, steps=5, targets=9).run(*data[left])
        for model in (cut_off(network, left), masked(network, left, mask))
    )
    assert torch.equal(plain.forwards, result.forwards)
