"""The trained model of the examples: it has learnt its task, and falls under attack by degrees."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from ironmoe.attacks import PGD, FrozenRouting, RoutingDivergence, Square
from ironmoe.moe.example import trained_example, trained_model

COUNT = 100
ROUNDING = 2  # images at the very boundary, which another processor may see on its other side


@pytest.fixture(scope="module")
def example():
    return trained_example(COUNT)


def fallen(attack, example):
    return int(attack.run(*example[1:]).success.sum())


def test_it_is_right_on_more_than_95_percent_of_images_that_it_never_saw():
    model, images, labels = trained_example()
    assert images.shape == (359, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1 and not model.training
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    assert right.double().mean() > 0.95 + ROUNDING / 359


def test_its_images_are_the_test_split_of_the_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    from ironmoe.bench.data.built_in import digits
    from ironmoe.bench.data.split import stratified

    data = digits()
    places = stratified(data.labels, data.names)[1]
    _, images, labels = trained_example()
    assert torch.equal(torch.from_numpy(data.images)[places], images)
    assert torch.equal(data.labels[places], labels)


def test_every_pixel_of_every_image_has_a_gradient(example):
    model, images, labels = example
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(images), labels), images)
    assert (gradient != 0).all()


def test_more_images_fall_at_a_larger_radius_and_to_a_stronger_attack(example):
    by_radius = [fallen(PGD(example[0], eps=eps / 255), example) for eps in (4, 16, 32)]
    assert all(more > less + 20 for less, more in pairwise(by_radius))

    blind = fallen(Square(example[0], eps=16 / 255, steps=100), example)
    assert 5 < blind < by_radius[1] - 10


def test_what_a_search_does_to_routing_makes_a_difference(example):
    free, diverging = (
        fallen(PGD(example[0], eps=24 / 255, **routing), example)
        for routing in ({}, {"routing": RoutingDivergence()})
    )
    assert diverging + 10 < free


def test_frozen_routing_finds_other_images(example):
    model, images, labels = example
    free, frozen = (
        PGD(model, eps=16 / 255, **routing).run(images, labels).success
        for routing in ({}, {"routing": FrozenRouting()})
    )
    assert (free != frozen).sum() > 0


def test_each_call_gives_a_model_of_its_own_with_the_same_weights():
    one, other = trained_model(), trained_model()
    with torch.no_grad():
        one.head.weight.add_(1)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(trained_model().head.weight, other.head.weight)


@pytest.mark.parametrize("count", [0, -1, 360])
def test_a_count_that_cannot_be_had_is_refused(count):
    with pytest.raises(ValueError, match=rf"count must be from 1 to 359 or None, got {count}"):
        trained_example(count)
