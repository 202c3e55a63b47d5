"""One perturbation for all images."""

import pytest
import torch
import toys
from conformance import labels_of
from torch import nn

from ironmoe.attacks import Regression, UniversalPerturbation
from ironmoe.attacks.balls.ball import ball_of

EPS = {"Linf": 0.05, "L2": 0.3, "L1": 0.8}


@pytest.fixture(scope="module")
def data():
    """(images and labels to search with, others)"""
    images, labels = toys.blobs(200, noise=0.15)
    others, other_labels = toys.blobs(100, noise=0.15, seed=1)
    return (images.double(), labels), (others.double(), other_labels)


@pytest.fixture(scope="module")
def model(data):
    (images, labels), _ = data
    return toys.mlp(images.float(), labels)


class Linear:
    """Two classes by the side of a hyperplane; every image is of the first one."""

    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.randn(1, 5, 6, generator=generator, dtype=torch.float64)
        self.images = 0.3 + 0.4 * torch.rand(90, 1, 5, 6, generator=generator, dtype=torch.float64)
        scores = (self.images * self.weight).flatten(1).sum(1)
        self.middle = scores.max() + 0.05
        self.labels = torch.zeros(90, dtype=torch.int64)
        assert torch.equal(labels_of(self, self.images), self.labels)

    def __call__(self, x):
        score = (x * self.weight.to(x.dtype)).flatten(1).sum(1) - self.middle
        return torch.stack([-score, score], 1)

    def best(self, norm, eps):
        """What raises the score the most, far from the faces of the box."""
        weight = self.weight
        if norm == "Linf":
            return eps * weight.sign()
        if norm == "L2":
            return eps * weight / weight.norm()
        return eps * weight.sign() * (weight.abs() == weight.abs().max())


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("loss", [None, "margin"])
def test_it_is_the_best_one_where_all_images_are_of_one_class_of_a_linear_model(norm, loss):
    model = Linear()
    eps = EPS[norm] / 4
    search = UniversalPerturbation(model, eps, norm=norm, loss=loss, batch_size=20)
    result = search.fit((model.images, model.labels))
    best = model.best(norm, eps)
    gain = (result.perturbation * model.weight).sum() / (best * model.weight).sum()
    assert 1 - 1e-3 < gain <= 1 + 1e-12
    torch.testing.assert_close(
        result.perturbation, best, rtol=0, atol=2e-2 * float(best.abs().max())
    )
    assert result.distance <= eps

    fell = labels_of(model, (model.images + best).clamp(0, 1)) == 1
    report = result.evaluate((model.images, model.labels))
    assert report.fooling_rate.count == int(fell.sum()) > 0


def test_a_targeted_one_leads_where_it_is_told(data, model):
    (images, _), (others, _) = data
    target = torch.full((200,), 2)
    result = UniversalPerturbation(model, 0.15, targeted=True).fit((images, target))
    report = result.evaluate((others, torch.full((100,), 2)))
    moved = labels_of(model, result.apply(others)) == 2
    not_there = labels_of(model, others) != 2
    assert torch.equal(report.clean_correct, not_there)
    assert torch.equal(report.fooled, moved & not_there)
    assert report.fooling_rate.value > 0.9
    assert (report.prediction[report.fooled] == 2).all()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_it_fools_other_images_much_more_often_than_noise_of_its_size(data, model, norm):
    search, others = data
    eps = 3 * EPS[norm] if norm != "L1" else 20.0
    result = UniversalPerturbation(model, eps, norm=norm, batch_size=50).fit(search)
    report = result.evaluate(others)
    assert report.fooling_rate.value > report.noise_rate.value + 0.2
    low, high = report.fooling_rate.interval()
    assert low < report.fooling_rate.value < high

    right = labels_of(model, others[0]) == others[1]
    fell = labels_of(model, result.apply(others[0])) != others[1]
    assert torch.equal(report.clean_correct, right)
    assert torch.equal(report.fooled, fell & right)
    assert report.accuracy.count == int((right & ~fell).sum())
    assert report.as_dict()["fooling_rate"]["value"] == report.fooling_rate.value
    assert str(report).startswith("fooled ")


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturbed_images_stay_in_ball_and_box(data, model, norm, dtype):
    (images, labels), _ = data
    images = images.to(dtype).clamp(0.02, 0.98)
    images[:10] = images[:10].round()  # at the faces of the box
    result = UniversalPerturbation(model.to(dtype), EPS[norm], norm=norm, epochs=2).fit(
        (images, labels)
    )
    model.double()
    perturbed = result.apply(images)
    assert perturbed.dtype == dtype and result.perturbation.dtype == dtype
    assert perturbed.min() >= 0 and perturbed.max() <= 1
    ball = ball_of(norm)(images, torch.full((200,), EPS[norm]).double(), (0.0, 1.0))
    assert (ball.distance(perturbed) <= EPS[norm]).all()
    assert 0.9 * EPS[norm] < result.distance <= EPS[norm]


def test_with_radii_of_elements_it_is_a_patch(data, model):
    """A corner of the image may become anything, and nothing else may change."""
    search, others = data
    eps = torch.zeros(1, 12, 12)
    eps[:, :6, :6] = 1.0
    result = UniversalPerturbation(model, eps).fit(search)
    changed = result.apply(others[0]) != others[0]
    assert not changed[:, eps == 0].any()
    assert not result.perturbation[eps == 0].any()
    assert result.perturbation.abs().max() > 0.5
    report = result.evaluate(others)
    assert report.fooling_rate.value > report.noise_rate.value


def test_it_is_the_same_for_the_same_seed(data, model):
    search, others = data
    fits = [
        UniversalPerturbation(model, 0.1, epochs=2, seed=seed, batch_size=32).fit(search)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(fits[0].perturbation, fits[1].perturbation)
    assert not torch.equal(fits[0].perturbation, fits[2].perturbation)
    reports = [fits[0].evaluate(others, batch_size=size) for size in (7, 100)]
    assert torch.equal(reports[0].fooled_by_noise, reports[1].fooled_by_noise)
    assert torch.equal(reports[0].fooled, reports[1].fooled)


def test_batches_are_streamed_again_and_again(data, model):
    (images, labels), _ = data

    class Loader:
        def __init__(self):
            self.begun = 0
            self.alive = 0

        def __iter__(self):
            self.begun += 1
            for first in range(0, 200, 40):
                yield images[first : first + 40], labels[first : first + 40]

    loader = Loader()
    search = UniversalPerturbation(model, 0.1, epochs=3, batch_size=40)
    result = search.fit(loader)
    assert loader.begun == 3 and len(result.losses) == 3
    assert result.forwards == result.backwards == 600
    with pytest.raises(ValueError, match="to be gone through 3 times, got generator, which can be"):
        search.fit(iter(loader))
    once = UniversalPerturbation(model, 0.1, epochs=1, batch_size=40)
    assert once.fit(iter(loader)).forwards == 200


def test_further_inputs_travel_with_their_images(data):
    (images, labels), _ = data
    generator = torch.Generator().manual_seed(4)
    shift = torch.rand(200, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(144, 4, generator=generator, dtype=torch.float64)
    wanted = {image.numpy().tobytes(): row for image, row in zip(images, shift, strict=True)}
    seen = []

    def model(x, shift):
        if not seen:  # nothing is changed yet
            seen.extend(zip(x.detach().clone(), shift, strict=True))
        return x.flatten(1) @ weight + shift

    result = UniversalPerturbation(model, 0.1, epochs=2).fit((images, labels, shift))
    assert len(seen) == 200
    assert all(torch.equal(wanted[image.numpy().tobytes()], row) for image, row in seen)
    assert len(result.evaluate((images, labels, shift)).fooled) == 200


def test_an_image_whose_loss_is_cut_off_does_not_lead(data):
    """One image has a loss of 100 and a gradient of its own; the other 9 agree on another one."""
    images = torch.full((10, 2), 0.5, dtype=torch.float64)
    images[0, 0] = 0.6
    labels = torch.zeros(10, dtype=torch.int64)

    def model(x):
        odd = x[:, 0] > 0.55
        score = torch.where(odd, 100 - 1000 * (x[:, 1] - 0.5), x[:, 1])
        return torch.stack([torch.zeros_like(score), score], 1)

    led = UniversalPerturbation(model, 0.01, clip=float("inf")).fit((images, labels))
    cut = UniversalPerturbation(model, 0.01).fit((images, labels))
    assert led.perturbation[1] < 0 < cut.perturbation[1]


def test_the_model_comes_back_as_it_was(data, model):
    search, others = data
    wrapped = nn.Sequential(model, nn.Dropout(0.3)).train()
    weights = [weight.detach().clone() for weight in wrapped.parameters()]
    result = UniversalPerturbation(wrapped, 0.1, epochs=1).fit(search)
    result.evaluate(others)
    assert wrapped.training and wrapped[1].training
    assert all(weight.requires_grad and weight.grad is None for weight in wrapped.parameters())
    assert all(map(torch.equal, weights, wrapped.parameters()))


def test_what_it_cannot_take_is_refused(data, model):
    search, _ = data
    for options, message in (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eps": float("inf")}, "eps must be finite"),
        ({"norm": "L7"}, "norm must be one of"),
        ({"loss": "steep"}, "loss must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            UniversalPerturbation(model, **options)
    with pytest.raises(TypeError, match="steps"):
        UniversalPerturbation(model, steps=3)
    with pytest.raises(ValueError, match="eps must be the same for all images"):
        UniversalPerturbation(model, torch.full((200,), 0.1)).fit(search)
    with pytest.raises(TypeError, match=r"data must be \(images, labels\), or batches"):
        UniversalPerturbation(model).fit(search[0])
    with pytest.raises(ValueError, match="data must hold at least one example, got none"):
        UniversalPerturbation(model).fit((search[0][:0], search[1][:0]))

    def breaks(x):
        nan = (x == search[0][11]).flatten(1).all(1, keepdim=True)
        return model(x).masked_fill(nan, float("nan"))

    with pytest.raises(ValueError, match="in the data number 11;"):
        UniversalPerturbation(breaks).fit(search)
    with pytest.raises(ValueError, match="HopSkipJump"):
        UniversalPerturbation(lambda x: model(x).argmax(1)).fit(search)


def test_it_serves_other_goals_than_labels():
    """Of a linear regression every image has the same best change, one way or the other."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    images = 0.3 + 0.4 * torch.rand(60, 1, 4, 4, generator=generator, dtype=torch.float64)

    def model(x):
        return (x * weight).flatten(1).sum(1)

    moved = 0.1 * float(weight.abs().sum())
    for tolerance, fooled in ((0.99 * moved, 60), (1.01 * moved, 0)):
        search = UniversalPerturbation(model, 0.1, goal=Regression(tolerance))
        result = search.fit((images, model(images)))
        assert abs(float((result.perturbation * weight).sum())) > (1 - 1e-6) * moved
        assert result.evaluate((images, model(images))).fooling_rate.count == fooled


def test_perturbed_images_lie_on_the_grid_of_levels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images = torch.randint(0, 256, (40, 1, 4, 4)) / 255
    labels = model(images).argmax(1)
    result = UniversalPerturbation(model, eps=0.1, epochs=2, levels=256).fit((images, labels))
    perturbed = result.apply(images)
    assert torch.equal((perturbed * 255).round() / 255, perturbed)
    assert float((perturbed - images).abs().max()) <= 0.1 + 1e-6
    assert result.evaluate((images, labels)).clean_accuracy.value == 1


def test_it_is_added_to_images_of_its_own_shape_alone(data, model):
    search, (images, _) = data
    result = UniversalPerturbation(model, 0.1, epochs=1).fit(search)
    one, few = images[:, :1, :1, :1], images[..., :1]
    for wrong in (one, few):
        if wrong.shape != images.shape:
            with pytest.raises(ValueError, match="images must have the shape of the perturbation"):
                result.apply(wrong)
    assert result.apply(images[:0]).shape == images[:0].shape
