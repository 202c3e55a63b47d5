"""Certificates against closed forms: constant and linear models, whose smoothed models are
known."""

from functools import partial
from statistics import NormalDist

import pytest
import scipy.stats
import torch
from torch import nn

from ironmoe.attacks.certificates import certify, predict, voting
from ironmoe.attacks.certificates.binomial import lower_bound
from ironmoe.attacks.certificates.noise import Draw, copy_keys

SIGMA = 0.5
NORMAL = NormalDist()
# Random tests fail with this probability where the code is right; their seeds are fixed.
ERROR = 1e-3


class Linear(nn.Module):
    """Class 1 where x·w > 0: the distance of an image from class 0 is x·w / ‖w‖."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        score = x.flatten(1) @ self.weight
        return torch.stack([-score, score], 1)


def copies_of_an_image(count, distance):
    """One image with one element, ``count`` times: each copy has a number, and so noise, of its
    own. Its distance from the other class of ``Linear([1])`` is in units of sigma."""
    images = torch.full((count, 1), distance * SIGMA, dtype=torch.float64)
    return images, torch.ones(count, dtype=torch.int64)


certified = partial(certify, sigma=SIGMA, batch_size=8192)


@pytest.mark.parametrize(
    ("samples", "radius"), [(100, 1.50), (1_000, 2.46), (10_000, 3.20), (100_000, 3.81)]
)
def test_a_model_of_one_answer_has_the_largest_radius_that_so_many_copies_can_prove(
    samples, radius
):
    """The figures of Cohen et al.: all agree, alpha .001."""
    data = torch.rand(1, 1), torch.tensor([2])
    report = certified(lambda x: torch.eye(3)[2].expand(len(x), 3), data, samples=samples)
    (only,) = report.certificates
    assert only.count == only.samples == samples and only.right and only.prediction == 2
    assert only.p_low == pytest.approx(0.001 ** (1 / samples), rel=1e-9)
    assert only.radius / SIGMA == pytest.approx(radius, abs=0.005)
    assert only.radius == report.largest_radius == report.mean_radius


def test_votes_have_the_share_that_a_linear_model_gives_them():
    weight = [3.0, -1.0, 0.5]
    model = Linear(weight)
    images = torch.tensor([[0.5, 0.2, 0.9], [0.05, 0.9, 0.1]], dtype=torch.float64)
    samples = 40_000
    report = certified(model, (images, torch.tensor([1, 0])), samples=samples)
    for image, each in zip(images, report.certificates, strict=True):
        distance = abs(float(image @ model.weight.detach())) / float(model.weight.detach().norm())
        share = NORMAL.cdf(distance / SIGMA)
        spread = (share * (1 - share) / samples) ** 0.5
        assert abs(each.count / samples - share) < NORMAL.inv_cdf(1 - ERROR / 2) * spread
        assert each.right and 0.9 * distance < each.radius < distance


def test_a_radius_exceeds_the_distance_no_more_often_than_alpha():
    repeats, alpha, distance = 4_000, 0.05, 1.0
    data = copies_of_an_image(repeats, distance)
    report = certified(Linear([1.0]), data, selection=10, samples=100, alpha=alpha)
    wrong = sum(each.radius > distance * SIGMA for each in report.certificates)
    assert wrong <= scipy.stats.binom.ppf(1 - ERROR, repeats, alpha)

    # Nor much less often: the votes leave few shares to choose from.
    share = NORMAL.cdf(distance)
    needed = next(k for k in range(101) if lower_bound(k, 100, alpha) > share)
    exact = scipy.stats.binom.sf(needed - 1, 100, share)
    low, high = scipy.stats.binom.ppf([ERROR / 2, 1 - ERROR / 2], repeats, exact)
    assert low <= wrong <= high


def share_certified(at, *, alpha, samples=100, selection=100, repeats=3_000):
    """(how often anything is certified, how often the right class has enough votes)"""
    data = copies_of_an_image(repeats, at)
    report = certified(Linear([1.0]), data, selection=selection, samples=samples, alpha=alpha)
    needed = next(k for k in range(samples + 1) if lower_bound(k, samples, alpha) >= 0.5)
    enough = scipy.stats.binom.sf(needed - 1, samples, NORMAL.cdf(at))
    return 1 - report.abstentions.value, enough


def spread(share, repeats=3_000):
    return NORMAL.inv_cdf(1 - ERROR / 2) * (share * (1 - share) / repeats) ** 0.5


def test_a_coin_is_certified_in_a_share_alpha_and_with_the_same_votes_twice_in_twice_as_many(
    monkeypatch,
):
    """Two draws, as the paper has them: the luck of the first is not that of the second. A draw
    that serves both purposes chooses the class that was lucky, and believes its luck."""
    found, enough = share_certified(0.0, alpha=0.05)
    assert enough < 0.05
    assert abs(found - enough) < spread(enough)

    def one_draw(seed, indices, draw, copies):
        return copy_keys(seed, indices, Draw.SELECTION, copies)

    monkeypatch.setattr(voting, "copy_keys", one_draw)
    found, enough = share_certified(0.0, alpha=0.05)
    assert abs(found - 2 * enough) < spread(2 * enough)
    assert found > 0.05 + spread(0.05)


def test_near_the_boundary_it_abstains_nearly_always():
    """94 % at a distance of .2 sigma with 100 copies."""
    found, enough = share_certified(0.2, alpha=0.001, selection=1_000, repeats=800)
    assert 0.92 < 1 - found < 0.96
    assert abs(found - enough) < spread(enough, 800)


def test_an_image_of_another_class_is_wrong_however_large_its_radius():
    images, labels = copies_of_an_image(5, 1.9)
    report = certified(Linear([1.0]), (images, labels - 1), samples=200)
    assert all(each.radius > 0 and not each.right for each in report.certificates)
    assert report.smoothed_accuracy.count == report.certified_accuracy_at(0).count == 0
    assert report.abstentions.count == report.mean_radius == 0


def test_noise_is_not_clamped():
    """A pixel of 0 under noise is below 0 in half of its copies."""
    images = torch.zeros(1, 1, dtype=torch.float64)
    report = certified(Linear([1.0]), (images, torch.ones(1, dtype=torch.int64)), samples=2_000)
    assert abs(report.certificates[0].count / 2_000 - 0.5) < spread(0.5, 2_000)


def test_a_prediction_abstains_as_the_binomial_test_does():
    images, _ = copies_of_an_image(2_000, 0.0)
    model = Linear([1.0])
    classes = predict(model, images, sigma=SIGMA, samples=100, alpha=0.05, batch_size=8192)
    needed = next(k for k in range(101) if scipy.stats.binomtest(k, 100).pvalue <= 0.05 and k > 50)
    names_one = 2 * scipy.stats.binom.sf(needed - 1, 100, 0.5)
    assert abs(float((classes >= 0).double().mean()) - names_one) < spread(names_one, 2_000)

    far, labels = copies_of_an_image(50, 1.9)
    assert torch.equal(predict(model, far, sigma=SIGMA, samples=200), labels)
    assert torch.equal(predict(model, -far, sigma=SIGMA, samples=200, bounds=(-1, 1)), 1 - labels)


def test_models_of_one_class_and_of_labels_alone():
    images = torch.rand(3, 4)
    labels = torch.zeros(3, dtype=torch.int64)
    one = certified(lambda x: x[:, :1], (images, labels), samples=50)
    assert one.smoothed_accuracy.count == 3 and one.mean_radius == one.largest_radius
    assert torch.equal(predict(lambda x: x[:, :1], images, sigma=1.0, samples=50), labels)

    linear = Linear([1.0, 1.0, -1.0, 0.0]).float()
    by_logits = certified(linear, (images, labels), samples=300)
    by_labels = certified(lambda x: linear(x).argmax(1), (images, labels), samples=300)
    assert by_logits.certificates == by_labels.certificates
