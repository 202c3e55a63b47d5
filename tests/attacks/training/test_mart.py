"""MART against its formula in float64."""

import math

import pytest
import torch
from training_toys import EPS, batch, linear

from ironmoe.attacks.training import MART, pgd


def formula(clean, attacked, labels, beta):
    """The loss by loops over images, of probabilities (B, C)."""
    total = 0.0
    for p, q, label in zip(clean.tolist(), attacked.tolist(), labels.tolist(), strict=True):
        others = max(value for j, value in enumerate(q) if j != label)
        divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        total -= math.log(q[label]) + math.log(1.0001 - others)
        total += beta * divergence * (1.0000001 - p[label])
    return total / len(labels)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_the_loss_is_the_formula(beta):
    model, (images, labels) = linear(), batch()
    torch.manual_seed(0)
    method = MART(model, EPS, beta=beta, steps=3)
    loss = method(images, labels)
    torch.manual_seed(0)
    points = pgd(model, images, labels, eps=EPS, steps=3, start="normal")
    clean, attacked = (model(x).softmax(1) for x in (images, points))
    assert loss.item() == pytest.approx(formula(clean, attacked, labels, beta), rel=1e-12)
    assert torch.equal(method.last["clean_correct"], clean.argmax(1) == labels)


def test_the_gradient_flows_through_every_term():
    model, (images, labels) = linear(), batch()
    points = (images + 0.05).requires_grad_(False)
    method = MART(model, EPS)

    def loss(weight):
        with torch.no_grad():
            model[1].weight.copy_(weight)
        return method._losses(images, labels, points)

    weight = model[1].weight.detach().clone()
    found = torch.autograd.grad(loss(weight), [model[1].weight])[0]
    step = torch.zeros_like(weight)
    step[1, 3] = 1e-6
    difference = (loss(weight + step) - loss(weight - step)).item() / 2e-6
    assert found[1, 3].item() == pytest.approx(difference, rel=1e-6)


def test_a_certain_model_has_a_finite_loss_and_gradient():
    model, (images, labels) = linear(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.no_grad():
        model[1].bias[0] = 1e4  # certain of class 0, and wrong for the others
    loss = MART(model, EPS)(images, labels)
    (grad,) = torch.autograd.grad(loss, [model[1].weight])
    assert loss.isfinite() and grad.isfinite().all()


def test_labels_must_be_classes():
    model, (images, labels) = linear(), batch()
    targets = torch.nn.functional.one_hot(labels, 3).double()
    with pytest.raises(TypeError, match="labels must be int64 classes"):
        MART(model, EPS)(images, targets)
