"""Several models searched on together."""

import copy

import pytest
import torch
import toys
from conformance import labels_of
from torch import nn

from ironmoe.attacks import CW, FAB, FGSM, MIFGSM, PGD, DeepFool, Ensemble, Square, evaluate

cross_entropy = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(80, noise=0.2)
    return images.double(), labels


@pytest.fixture(scope="module")
def models(data):
    return [toys.mlp(data[0].float(), data[1], seed) for seed in range(4)]


def test_an_ensemble_is_a_model_whose_logits_are_the_mean(data, models):
    mean = torch.stack([model(data[0]) for model in models[:3]]).mean(0)
    for by in ("logits", "loss"):
        ensemble = Ensemble(models[:3], by)
        torch.testing.assert_close(ensemble(data[0]), mean, rtol=0, atol=1e-12)
        assert ensemble.each(data[0]).shape == (80, 3, 4)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    mixed = Ensemble([models[0], lambda x: Output(models[1](x)), models[2].forward])
    torch.testing.assert_close(mixed(data[0]), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", ["logits", "loss"])
def test_the_gradient_is_that_of_the_mean_loss_or_of_the_loss_of_the_mean(data, models, by):
    images, labels = data
    point = images.clone().requires_grad_()
    logits = torch.stack([model(point) for model in models[:3]])
    expected = {
        "logits": lambda: cross_entropy(logits.mean(0), labels, reduction="none"),
        "loss": lambda: torch.stack(
            [cross_entropy(each, labels, reduction="none") for each in logits]
        ).mean(0),
    }[by]()
    (grad,) = torch.autograd.grad(expected.sum(), [point])

    attack = PGD(Ensemble(models[:3], by))
    attack.attacked_model.image_dtype = torch.float64
    answer = attack.ask({"point": images, "label": labels}, True)
    torch.testing.assert_close(answer.loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(answer.grad, grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(answer.logits, logits.mean(0), rtol=0, atol=1e-9)

    step = FGSM(Ensemble(models[:3], by), 0.05)(images, labels)
    right = labels_of(Ensemble(models[:3]), images) == labels
    clipped = (images + 0.05 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(step[right], clipped[right], rtol=0, atol=1e-7)


def test_the_mean_of_losses_is_not_led_by_the_model_of_the_largest_logits(data, models):
    """One model has logits a thousand times as large; by its loss it is one of three."""
    images, labels = data

    def loud(x):
        return 1000 * models[0](x)

    others = []
    for by in ("logits", "loss"):
        attack = PGD(Ensemble([loud, *models[1:3]], by), 0.1, loss="dlr", early_stop=False)
        adversarial = attack(images, labels)
        fallen = [
            (labels_of(model, adversarial) != labels).double().mean() for model in models[1:3]
        ]
        others.append(sum(fallen))
    assert others[1] > others[0]


@pytest.mark.parametrize("make", [FAB, DeepFool])
def test_differences_of_logits_are_the_same_either_way(data, models, make):
    images, labels = data
    results = [
        make(Ensemble(models[:2], by), 0.2, norm="Linf").run(images, labels)
        for by in ("logits", "loss")
    ]
    assert results[0].success.any()
    assert torch.equal(results[0].success, results[1].success)
    if make is FAB:  # DeepFool asks first which classes are likely, as it does with eot
        torch.testing.assert_close(
            results[0].adversarial, results[1].adversarial, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("make", [Square, CW, MIFGSM])
def test_other_attacks_take_an_ensemble_and_count_its_passes_as_one(data, models, make):
    images, labels = data
    options = {"norm": "L2"} if make is CW else {}
    for by in ("logits", "loss"):
        rows = []
        ensemble = Ensemble([lambda x, m=m: m(x) for m in models[:2]], by)
        handle = ensemble.each

        def counting(x, rows=rows, each=handle):
            rows.append(len(x))
            return each(x)

        ensemble.each = counting
        result = make(ensemble, 0.3, steps=5, **options).run(images[:20], labels[:20])
        assert int(result.forwards.sum()) == sum(rows)
        assert torch.equal(result.prediction, labels_of(Ensemble(models[:2]), result.adversarial))


@pytest.mark.parametrize("by", ["logits", "loss"])
def test_what_models_have_in_common_transfers(by):
    """Each source's weights are those of the target plus noise of its own, which a mean of nine
    makes three times smaller."""
    generator = torch.Generator().manual_seed(0)
    common, *noises = torch.randn(10, 400, generator=generator, dtype=torch.float64)
    images = 0.3 + 0.4 * torch.rand(100, 400, generator=generator, dtype=torch.float64)

    def linear(weight):
        middle = (images @ weight).median()

        def model(x):
            score = x @ weight - middle
            return torch.stack([-score, score], 1)

        return model

    target = linear(common)
    sources = [linear(common + 3 * noise) for noise in noises]
    labels = labels_of(target, images)

    def fell(source):
        attack = {"a": FGSM(source, 0.15, norm="L2")}
        report = evaluate(target, (images, labels), attack, search_model=source, checks=False)
        return int(report.attacks["a"].fell.sum())

    alone = [fell(source) for source in sources]
    assert max(alone) < 45
    assert fell(Ensemble(sources, by)) > max(alone) + 10


def test_its_models_come_back_as_they_were(data, models):
    members = [nn.Sequential(copy.deepcopy(model), nn.Dropout(0.5)).train() for model in models[:2]]
    ensemble = Ensemble(members, "loss")
    PGD(ensemble, 0.05, steps=2).run(*data)
    assert all(module.training for member in members for module in (member, member[1]))
    assert all(parameter.requires_grad for parameter in ensemble.parameters())
    assert len(list(ensemble.parameters())) == 8


def test_what_is_no_ensemble_is_refused(data, models):
    with pytest.raises(ValueError, match="models must hold at least one model, got none"):
        Ensemble([])
    with pytest.raises(TypeError, match=r"models\[1\] must be callable, got int"):
        Ensemble([models[0], 3])
    with pytest.raises(ValueError, match="by must be 'logits' or 'loss', got 'mean'"):
        Ensemble(models, "mean")
    two = Ensemble([models[0], lambda x: models[1](x)[:, :3]])
    with pytest.raises(ValueError, match=r"outputs of one shape, got \[\(80, 4\), \(80, 3\)\]"):
        two(data[0])
