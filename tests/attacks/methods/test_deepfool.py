import pytest
import torch
import toys
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks.engine.active_batch import ActiveBatch, blank_attempts
from ironmoe.attacks.methods.deepfool import DeepFool
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.random import example_keys

INF = float("inf")
NORMS = ["Linf", "L2"]


class Linear(torch.nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.layer = torch.nn.Linear(dim, classes, bias=False)
        torch.nn.init.normal_(self.layer.weight)

    def forward(self, x):
        return self.layer(x.flatten(1))

    def distances(self, x, labels, norm):
        """(N, C) float64, to each class; inf to the label."""
        weight, logits = self.layer.weight.double(), self(x).double()
        across = weight[None] - weight[labels][:, None]
        slope = across.abs().sum(2) if norm == "Linf" else across.norm(dim=2)
        gap = logits.gather(1, labels[:, None]) - logits
        return (gap / slope.clamp_min(1e-12)).scatter(1, labels[:, None], INF).detach()


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(40)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 6])
def test_one_step_over_the_nearest_linear_boundary(norm, classes):
    model, x = Linear(30, classes), torch.randn(20, 2, 3, 5)
    labels = model(x).argmax(1)
    result = DeepFool(model, norm=norm, bounds=(-100.0, 100.0)).run(x, labels)
    best = model.distances(x, labels, norm).amin(1)
    assert result.success.all()
    torch.testing.assert_close(result.distance, 1.02 * best, rtol=1e-3, atol=1e-6)
    assert (result.steps == classes - 1).all()  # asked about each boundary once


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_most_likely_classes_are_considered(norm):
    """The runner-up's boundary is 10 away, that of the least likely class 0.05."""

    def model(x):
        return torch.stack([torch.ones(len(x)), 0.9 + 0.01 * x[:, 0], 0.5 + 10 * x[:, 1]], 1)

    for top_classes, expected in ((2, 10.0), (3, 0.05), (10, 0.05)):
        attack = DeepFool(model, top_classes=top_classes, norm=norm, bounds=(-100.0, 100.0))
        result = attack.run(torch.zeros(1, 2), torch.tensor([0]))
        assert result.success.all() and result.distance.item() == pytest.approx(
            1.02 * expected, rel=1e-4
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_image_falls_close_to_the_least_distance(data, norm, dtype):
    images, labels = data[0].to(dtype), data[1]
    model = toys.mlp(data[0].float(), labels).to(dtype)
    result = DeepFool(model, norm=norm).run(images, labels)
    nearest = FAB(model, INF, steps=20, targets=0, norm=norm, early_stop=False).run(images, labels)
    ratio = result.distance / nearest.distance
    assert result.success.all() and result.adversarial.dtype == dtype
    assert ratio.min() > 0.95 and ratio.median() < 1.1
    assert result.forwards.double().mean() < 0.5 * nearest.forwards.double().mean()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_a_finite_eps_separates_near_from_far(model, data, norm):
    free = DeepFool(model, norm=norm).run(*data)
    eps = free.distance.median()
    result = DeepFool(model, eps, norm=norm).run(*data)
    assert (result.distance <= eps).all()
    assert (
        result.success[free.distance <= eps].all()
        and not result.success[free.distance > 1.1 * eps].any()
    )
    torch.testing.assert_close(
        result.adversarial[free.distance <= eps], free.adversarial[free.distance <= eps]
    )


class Kinked(torch.nn.Module):
    """z₁ − z₀ bends so that the first step, overshot by a quarter, lands on the boundary itself: a
    tie, which class 0 wins."""

    def forward(self, x):
        pixel = x.flatten(1)[:, 0]
        return torch.stack(
            [torch.zeros_like(pixel), torch.minimum(pixel - 0.5, (pixel - 0.625) / 2)], 1
        )


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_gets_stuck_on_the_boundary(norm):
    result = DeepFool(Kinked(), steps=5, overshoot=0.25, norm=norm).run(
        torch.zeros(1, 2), torch.tensor([0])
    )
    assert result.success.all() and result.distance < 0.63


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30])
def test_gradients_that_vanish_give_no_nan(norm, scale):
    images, labels = torch.rand(3, 1, 4, 4), torch.full((3,), 2)
    result = DeepFool(
        lambda x: scale * x.flatten(1)[:, :3] + torch.tensor([1.0, 2, 3]), steps=4, norm=norm
    ).run(images, labels)
    assert not result.success.any() and result.adversarial.isfinite().all()
    if scale == 0:
        assert torch.equal(result.adversarial, images) and result.flags["zero_gradient"].all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_batch_does_not_matter(model, data, norm):
    images, labels = data
    attack = DeepFool(model, norm=norm)
    whole = attack.run(images, labels)
    order = torch.randperm(len(labels))
    shuffled = attack.run(images[order], labels[order])
    torch.testing.assert_close(shuffled.adversarial, whole.adversarial[order], rtol=0, atol=1e-9)
    one = attack.run(images[7:8], labels[7:8])
    torch.testing.assert_close(one.adversarial, whole.adversarial[7:8], rtol=0, atol=1e-9)
    assert torch.equal(shuffled.steps, whole.steps[order]) and torch.equal(
        one.steps, whole.steps[7:8]
    )


@pytest.mark.parametrize("norm", NORMS)
def test_without_radius_or_steps_nothing_falls(model, data, norm):
    for attack in (DeepFool(model, 0.0, steps=3, norm=norm), DeepFool(model, steps=0, norm=norm)):
        result = attack.run(*data)
        assert torch.equal(result.adversarial, data[0]) and not result.success.any()


def test_nothing_waits_for_the_device():
    """On fake tensors whatever needs a value, .item() or a nonzero, raises."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = ActiveBatch(DeepFool(model, 0.1), 4, 1, fixed=True)
        labels = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        eps = mode.from_tensor(torch.full((4,), 0.1, dtype=torch.float64))
        images = mode.from_tensor(torch.rand(4, 1, 2, 4))
        attempts = blank_attempts(
            images, labels, eps, labels, labels == 0, example_keys(0, labels, 0)
        )
        batch.attack.start(attempts)
        batch.attempts, batch.owners = attempts, [None] * 4
        for _ in range(3):
            batch.round()


def test_rows_that_are_over_may_stay(model, data):
    """As on a GPU, where rows whose attempt is over are asked until the host looks."""
    images, labels = data
    batch = ActiveBatch(DeepFool(model, 0.5), 40, 1, fixed=True)
    yes = torch.ones(40, dtype=torch.bool)
    eps = torch.full((40,), 0.5, dtype=torch.float64)
    batch.attack.attacked_model.image_dtype = torch.float64
    batch.attempts = blank_attempts(images, labels, eps, labels, yes, example_keys(0, labels, 0))
    batch.attack.start(batch.attempts)
    batch.owners = [None] * 40
    for _ in range(30):
        batch.round()
    assert batch.attempts["over"].all() and batch.attempts["point"].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"overshoot": -0.1},
        {"top_classes": 1},
        {"targeted": True},
        {"eps": -1.0},
        {"norm": "L1"},
    ],
)
def test_errors_name_the_argument(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DeepFool(torch.nn.Flatten(), **options)


class Recorded(torch.nn.Module):
    """Remembers which contender each gradient was taken of; random logits on top of linear ones."""

    def __init__(self, classes, noise):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(classes, 6, generator=generator, dtype=torch.float64)
        self.noise = noise

    def forward(self, x):
        logits = x @ self.weight.T
        return logits + self.noise * torch.randn_like(logits)


@pytest.mark.parametrize("eot", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda m, **o: DeepFool(m, 5.0, steps=1, top_classes=5, **o),
        lambda m, **o: FAB(m, 5.0, steps=1, targets=0, **o),
    ],
)
def test_a_random_model_does_not_change_the_contenders(make, eot):
    """Each question is about one class in all of its passes, and no class is asked about twice at a
    point."""
    model = Recorded(12, 3.0)
    attack = make(model, eot=eot, norm="L2")
    asked, loss = [], attack.loss

    def noted(logits, attempts):
        value = loss(logits, attempts)
        difference = (
            logits - logits.gather(1, attempts["label"].unsqueeze(1)) - value.unsqueeze(1)
        ).abs()
        asked.append((int(attempts["queries"][0]), int(difference.argmin(1)[0])))
        return value

    attack.loss = noted
    images = torch.rand(1, 6, dtype=torch.float64)
    attack.fooled = lambda logits, attempts: torch.zeros_like(attempts["label"], dtype=torch.bool)
    attack.run(images, (images @ model.weight.T).argmax(1))
    by_question = {}
    for question, contender in asked:
        by_question.setdefault(question, set()).add(contender)
    # the first question only finds the likeliest
    rankings = 1 if eot > 1 and isinstance(attack, DeepFool) else 0
    contenders = [
        next(iter(classes)) for question, classes in by_question.items() if question >= rankings
    ]
    assert all(
        len(classes) == 1 for question, classes in by_question.items() if question >= rankings
    )
    at_first_point = contenders[: 4 if isinstance(attack, DeepFool) else 11]
    assert len(set(at_first_point)) == len(at_first_point)
