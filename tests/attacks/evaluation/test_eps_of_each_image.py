"""eps and bounds of each image of a data set: masks of padding, places of patches."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import APGD, FGSM, PGD, Square, evaluate

COUNT = 11


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))


@pytest.fixture
def data(model):
    x = torch.rand(COUNT, 1, 4, 4)
    return x, model(x).argmax(1)


def masks():
    masks = (torch.rand(COUNT, 1, 4, 4) < 0.5).float()
    masks[:, 0, 0, 0] = 1
    masks[8:] = 1  # a whole batch without a mask
    return masks


@pytest.mark.parametrize("kind", [PGD, APGD, Square])
def test_each_image_has_its_own_mask(model, data, kind, tmp_path):
    eps = 0.4 * masks()
    bounds = (torch.zeros(COUNT, 1, 1, 1), torch.linspace(1, 2, COUNT).view(-1, 1, 1, 1))
    attack = kind(model, eps=eps, bounds=bounds)
    arguments = {"batch_size": 4, "keep_adversarial": True, "journal": tmp_path}
    summary = evaluate(model, data, {"a": attack}, **arguments).attacks["a"]

    alone = attack.run(*data)
    assert torch.equal(summary.fell, alone.success) and summary.fell.any()
    change = (summary.adversarial - data[0]).abs()
    assert not change[eps == 0].any() and change.max() <= 0.4
    assert (summary.adversarial.amax((1, 2, 3)) <= bounds[1].flatten()).all()
    again = evaluate(model, data, {"a": attack}, **arguments).attacks["a"]
    assert torch.equal(again.adversarial, summary.adversarial)


def test_radii_scale_the_masks(model, data):
    report = evaluate(model, data, {"p": PGD(model, eps=masks())}, eps=[0.1, 0.4])
    exact = PGD(model, eps=0.4 * masks().sign()).run(*data)
    assert report.attacks["p"].robust_at(0.1).sum() >= report.attacks["p"].robust_at(0.4).sum()
    assert report.attacks["p"].eps == (0.1, 0.4) and len(exact.success) == COUNT


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (torch.rand(5, 1, 4, 4), f"one entry for each of {COUNT} images"),
        (torch.linspace(0.1, 1, COUNT), "the same largest element in every"),
    ],
)
def test_what_an_evaluation_cannot_take_is_said(model, data, eps, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, {"p": PGD(model, eps=eps)})


def test_attacks_beside_each_other_have_the_same_masks(model, data):
    with pytest.raises(ValueError, match="the same eps and bounds of each image"):
        evaluate(model, data, {"p": PGD(model, eps=masks()), "f": FGSM(model, eps=0.1)})


def test_a_stream_of_unknown_length_has_no_masks_of_its_own(model, data):
    batches = iter([data])
    with pytest.raises(ValueError, match="each of an unknown number of images"):
        evaluate(model, batches, {"p": PGD(model, eps=masks())})


@pytest.mark.parametrize("batch_size", [3, 5, 20])
@pytest.mark.parametrize("levels", [None, 256])
def test_what_features_say_does_not_depend_on_the_number_of_images(batch_size, levels):
    """A batch, or the images that the checks look at, may be as many as a row has features."""
    torch.manual_seed(0)
    rows = (torch.rand(23, 5) * 255).round() / 255
    model = nn.Linear(5, 3)
    labels = model(rows).argmax(1)
    eps = torch.tensor([0.3, 0.0, 0.1, 0.3, 0.2])
    attack = PGD(model, eps=eps, bounds=(torch.zeros(5), torch.ones(5)), levels=levels)
    bumped = PGD(model, eps=eps, bounds=(torch.zeros(5), torch.tensor([1.0, 1, 1, 1, 2])))
    for one in (attack, bumped):
        report = evaluate(model, (rows, labels), {"p": one}, batch_size=batch_size)
        assert torch.equal(report.attacks["p"].fell, one.run(rows, labels).success)
