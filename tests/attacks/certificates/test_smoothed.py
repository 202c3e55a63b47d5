"""The smoothed model under attack: its gradient, its noise, and the two curves side by side."""

import copy
import json

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import APGD, PGD, FrozenRouting, Square, evaluate
from ironmoe.attacks.certificates import (
    AttackCurve,
    CertificationReport,
    Fate,
    Smoothed,
    attack_curve,
    certified_and_attacked,
    certify,
    predict,
)
from ironmoe.moe import VMoE

SIGMA = 0.25


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(24)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    """Trained under the noise that it is smoothed by."""
    images, labels = toys.blobs(24)
    repeated, noise = images.repeat(10, 1, 1, 1), torch.Generator().manual_seed(3)
    noisy = repeated + SIGMA * torch.randn(repeated.shape, generator=noise)
    return toys.mlp(noisy, labels.repeat(10))


def test_it_is_the_logarithm_of_the_mean_softmax_over_its_copies(model, data):
    """Of one linear layer: the noise that it adds is what the logits differ by."""
    images, _ = data
    seen = []

    def watched(x):
        seen.append(x)
        return model(x)

    smoothed = Smoothed(watched, SIGMA, draws=5, seed=3)
    log_shares = smoothed(images)
    assert log_shares.shape == (24, 4)
    torch.testing.assert_close(log_shares.exp().sum(1), torch.ones(24).double())

    copies = seen[0].view(24, 5, *images.shape[1:])
    noise = copies - images.unsqueeze(1)
    torch.testing.assert_close(noise, noise[:1].expand_as(noise))  # the same for each image
    assert len({each.numpy().tobytes() for each in copies[0]}) == 5
    wanted = torch.stack([model(images + each).softmax(1) for each in noise[0]]).mean(0).log()
    torch.testing.assert_close(log_shares, wanted)


def test_its_noise_is_gaussian_and_depends_on_the_seed_alone():
    seen = []

    def model(x):
        seen.append(x)
        return x[:, :2]

    images = torch.full((1, 400), 0.5)
    for seed in (0, 0, 1):
        Smoothed(model, SIGMA, draws=50, seed=seed)(images)
    first, again, other = (each - 0.5 for each in seen)
    assert torch.equal(first, again) and not torch.equal(first, other)
    scaled = first.flatten().double() / SIGMA
    count = len(scaled)
    # 5 standard deviations of mean, variance and fourth moment
    assert abs(float(scaled.mean())) < 5 / count**0.5
    assert abs(float(scaled.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((scaled**4).mean()) - 3) < 5 * (96 / count) ** 0.5


def test_an_image_gets_the_same_answer_in_every_batch(model, data):
    images, _ = data
    smoothed = Smoothed(model, SIGMA, draws=3)
    whole = smoothed(images)
    torch.testing.assert_close(smoothed(images.flip(0)).flip(0), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(smoothed(images[7:9]), whole[7:9], rtol=0, atol=1e-12)


def test_its_gradient_is_that_of_the_loss_of_smoothadv(model, data):
    images, labels = data[0][:3], data[1][:3]
    smoothed = Smoothed(model, SIGMA, draws=4)
    point = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(smoothed(point), labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, [point])
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(5)).double()
    step = 1e-5
    ends = [
        nn.functional.cross_entropy(smoothed(images + sign * step * way), labels, reduction="sum")
        for sign in (1, -1)
    ]
    slope = float((ends[0] - ends[1]).detach() / (2 * step))
    assert float((grad * way).sum()) == pytest.approx(slope, rel=1e-6)


def test_noise_comes_before_the_normalisation():
    seen = []

    def model(x):
        seen.append(x)
        return x.flatten(1)[:, :3]

    images = torch.rand(2, 3, 4, 4)
    called = {"normalize": ([0.5], [0.1])}
    Smoothed(model, SIGMA, draws=2)(images)
    Smoothed(model, SIGMA, draws=2, **called)(images)
    torch.testing.assert_close(seen[1], (seen[0] - 0.5) / 0.1)

    seen.clear()
    certify(model, (images, torch.zeros(2, dtype=torch.int64)), sigma=SIGMA, samples=40, **called)
    spread = float(seen[-1].std())
    assert 0.8 * (SIGMA**2 + 1 / 12) ** 0.5 / 0.1 < spread < 1.2 * (SIGMA**2 + 1 / 12) ** 0.5 / 0.1


def test_half_precision_gets_noise_of_full_precision():
    """A uniform number rounded to bfloat16 may be 1, and its normal one infinite."""
    seen = []

    def model(x):
        seen.append(x)
        return x[:, :2]

    images = torch.full((4, 5_000), 0.5, dtype=torch.bfloat16)
    assert Smoothed(model, SIGMA, draws=8)(images).dtype == torch.float32
    data = images, torch.zeros(4, dtype=torch.int64)
    certify(model, data, sigma=SIGMA, samples=8)
    attack_curve(model, data, [0.1], sigma=SIGMA, samples=8, draws=2, steps=2)
    assert all(each.dtype == torch.bfloat16 and each.isfinite().all() for each in seen)


def test_attacks_of_every_kind_take_it(model, data):
    smoothed = Smoothed(model, SIGMA, draws=3)
    attacks = {
        "pgd": PGD(smoothed, norm="L2", steps=5),
        "apgd": APGD(smoothed, norm="L2", steps=5),
        "square": Square(smoothed, norm="L2", steps=10),
    }
    report = evaluate(smoothed, data, attacks, eps=[0.5, 3.0], checks=False)
    fallen = {name: int(summary.fell.sum()) for name, summary in report.attacks.items()}
    assert fallen["pgd"] > 0 and fallen["apgd"] > 0
    again = evaluate(smoothed, data, attacks, eps=[0.5, 3.0], checks=False, batch_size=5)
    for name, summary in again.attacks.items():
        assert torch.equal(summary.fell_at, report.attacks[name].fell_at)


def test_routing_modes_reach_through_it():
    torch.manual_seed(0)
    vmoe = VMoE(8, 4, 8, 1, 2, 8, 3, moe_layers=(0,), channels=1, classifier="gap").double()
    nn.init.normal_(vmoe.head.weight)
    images, labels = torch.rand(4, 1, 8, 8).double(), torch.arange(4) % 3
    smoothed = Smoothed(vmoe, SIGMA, draws=3)
    attack = PGD(smoothed, 2.0, norm="L2", steps=3, routing=FrozenRouting(), early_stop=False)
    together = attack.run(images, labels)
    alone = [attack.run(images[i : i + 1], labels[i : i + 1], torch.tensor([i])) for i in range(4)]
    for place, one in enumerate(alone):
        torch.testing.assert_close(one.adversarial[0], together.adversarial[place])
    assert vmoe.training  # it came back as it was


def test_further_inputs_travel_with_their_images():
    def model(x, shift, *, scale):
        assert len(x) == len(shift) == len(scale)
        return torch.stack([x.mean(1), shift * scale], 1)

    images = torch.full((3, 4), 0.5)
    shift, scale = torch.tensor([0.0, 10.0, 0.0]), torch.tensor([1.0, 1.0, 5.0])
    classes = Smoothed(model, 0.1, draws=2)(images, shift, scale=scale).argmax(1)
    assert classes.tolist() == [0, 1, 0]

    def by_position(x, shift):
        return model(x, shift, scale=torch.ones_like(shift))

    labels = torch.tensor([0, 1, 0])
    report = certify(by_position, (images, labels, shift), sigma=0.1, samples=40)
    assert report.smoothed_accuracy.count == 3
    assert torch.equal(predict(by_position, images, sigma=0.1, extra=shift), labels)
    curve = attack_curve(by_position, (images, labels, shift), [0.1], sigma=0.1, samples=40)
    assert curve.accuracy_at(0.1).count == 3


def test_certified_accuracy_is_below_and_attacked_accuracy_above(model, data):
    state = copy.deepcopy(model.train().state_dict())
    report = certify(model, data, sigma=SIGMA, samples=400)
    radii = [0, 0.2, 0.4, 0.8, 1.6, 3.0]
    curve = attack_curve(model, data, radii, sigma=SIGMA, samples=200, draws=8, steps=8)
    assert model.training and all(torch.equal(state[name], w) for name, w in state.items())

    rows = certified_and_attacked(report, curve)
    assert [row.radius for row in rows] == radii
    certified = [row.certified.count for row in rows]
    attacked = [row.attacked.count for row in rows]
    assert all(low <= high for low, high in zip(certified, attacked, strict=True))
    assert certified == sorted(certified, reverse=True)
    assert attacked == sorted(attacked, reverse=True)
    assert certified[1] > 20 and attacked[-1] < 5  # both say something
    for one, other in zip(report.certificates, curve.images, strict=True):
        assert not one.right or one.radius < other.fell_at  # image by image

    assert json.loads(json.dumps(curve.as_dict()))["curve"][0]["radius"] == 0
    assert "upper bound" in str(curve)


def test_the_attack_on_a_linear_model_goes_as_far_as_the_boundary():
    """Two classes by the side of a hyperplane: images fall from their distance on, and the radius
    of a certificate ends shortly before."""
    weight = torch.tensor([2.0, -1.0, 1.0, 0.5], dtype=torch.float64)

    def model(x):
        score = x @ weight - 0.9
        return torch.stack([-score, score], 1)

    images = torch.rand(8, 4, generator=torch.Generator().manual_seed(2)).double()
    distance = (images @ weight - 0.9) / weight.norm()
    images = images[distance.abs() > 0.1]
    distance = (images @ weight - 0.9) / weight.norm()
    data = images, (distance > 0).long()
    radii = [0.05, *(f * float(d.abs()) for d in distance[:2] for f in (0.7, 1.6))]
    wide = {"sigma": SIGMA, "bounds": (-9.0, 9.0)}
    curve = attack_curve(model, data, radii, samples=2_000, **wide)
    report = certify(model, data, samples=20_000, alpha=1e-6, batch_size=8192, **wide)
    for image, true, proved in zip(curve.images, distance.abs(), report.certificates, strict=True):
        assert image.fell_at > float(true)
        assert 0.75 * float(true) < proved.radius < float(true)
    for number in range(2):
        assert curve.images[number].fell_at <= 1.6 * float(distance[number].abs())


def test_images_that_few_copies_call_wrong_are_attacked_too(monkeypatch):
    """One draw, whose noise puts every image onto the wrong side; the vote says otherwise."""
    weight = torch.ones(6, dtype=torch.float64)

    def model(x):
        score = x @ weight - 2.4
        return torch.stack([-score, score], 1)

    images = torch.full((1, 6), 0.5, dtype=torch.float64)
    data = images, torch.tensor([1])
    seed = next(s for s in range(50) if Smoothed(model, 1.0, draws=1, seed=s)(images).argmax() == 0)
    options = {"sigma": 1.0, "draws": 1, "seed": seed, "samples": 2_000}
    assert attack_curve(model, data, [1.0], **options).images == [Fate(0, 1, 1, 1.0)]


def test_another_attack_may_be_named(model, data):
    made = []

    def attack(smoothed, radius):
        made.append((smoothed, radius))
        return APGD(smoothed, radius, norm="L2", steps=3)

    options = {"sigma": SIGMA, "samples": 30, "limit": 4}
    attack_curve(model, data, [1.0, 0, 2.0], attack=attack, **options)
    assert [radius for _, radius in made] == [1.0, 2.0]
    assert all(isinstance(smoothed, Smoothed) for smoothed, _ in made)
    with pytest.raises(ValueError, match="attack must be one in L2"):
        attack_curve(model, data, [1.0], attack=lambda s, r: PGD(s, r), **options)


def test_an_abstention_is_not_a_fall():
    """The image lies on the boundary: nobody can say which class the smoothed model gives it."""
    images = torch.full((3, 1), 0.5, dtype=torch.float64)

    def model(x):
        return torch.cat([0.5 - x, x - 0.5], 1)

    data = images, torch.tensor([0, 1, 1])
    curve = attack_curve(model, data, [1e-9, 0.4], sigma=SIGMA, samples=100)
    assert [image.prediction for image in curve.images] == [-1, -1, -1]
    assert [image.fell_at for image in curve.images] == [0.4, 0.4, 0.4]


def test_curves_of_other_images_are_not_put_side_by_side():
    options = {"selection": 1, "samples": 1, "alpha": 0.1}
    report = CertificationReport([], sigma=0.5, **options)
    of = {"radii": (0.1,), "samples": 1, "alpha": 0.1}
    with pytest.raises(ValueError, match=r"curve must have the same sigma as report, got 0.2"):
        certified_and_attacked(report, AttackCurve([], sigma=0.2, **of))
    other = AttackCurve([Fate(0, 1, 1, 0.1)], sigma=0.5, **of)
    with pytest.raises(ValueError, match="curve must be about the same images as report, got 1"):
        certified_and_attacked(report, other)
    with pytest.raises(ValueError, match="radius must be 0 or one of"):
        other.accuracy_at(0.3)
