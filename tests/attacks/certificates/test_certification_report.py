"""What a report says: shares with their intervals, errors to expect, and what is certified."""

import json

import pytest
import torch
from torch import nn

from ironmoe.attacks.certificates import Certificate, CertificationReport, certify
from ironmoe.attacks.certificates.binomial import lower_bound
from ironmoe.attacks.evaluation.proportion import Proportion

SIGMA = 0.5


def row(index, radius, right, abstains=False):
    return Certificate(
        index=index,
        label=1,
        prediction=-1 if abstains else int(right),
        choice=int(right),
        count=90,
        samples=100,
        p_low=0.4 if abstains else 0.8,
        radius=radius,
        right=right,
    )


def report(rows, **options):
    options = {"sigma": SIGMA, "selection": 10, "samples": 100, "alpha": 0.001} | options
    return CertificationReport(rows, **options)


MIXED = report(
    [
        row(0, 0.3, True),
        row(1, 0.1, True),
        row(2, 0.7, False),
        row(3, 0.0, False, abstains=True),
    ]
)


def test_certified_accuracy_counts_right_images_whose_radius_reaches_far_enough():
    shares = MIXED.certified_accuracy([0, 0.1, 0.2, 0.3, 0.31])
    assert [share.count for share in shares.values()] == [2, 2, 1, 1, 0]
    assert all(share.total == 4 for share in shares.values())
    assert shares[0.1].interval() == Proportion(2, 4).interval()
    assert MIXED.smoothed_accuracy == Proportion(2, 4)
    assert MIXED.abstentions == Proportion(1, 4)
    assert MIXED.mean_radius == pytest.approx((0.3 + 0.1) / 4)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        MIXED.certified_accuracy([-1])


def test_the_mean_radius_is_the_area_under_the_curve():
    grid = [step / 1_000 for step in range(1_000)]
    area = sum(share.value for share in MIXED.certified_accuracy(grid).values()) / 1_000
    assert MIXED.mean_radius == pytest.approx(area, abs=2e-3)


def test_the_first_line_says_what_is_certified():
    first = str(MIXED).splitlines()[0]
    assert "smoothed model" in first and "not about the model itself" in first
    assert "floating point" in first and "sigma 0.5" in first
    assert MIXED.as_dict()["certifies"] == first


def test_errors_to_expect_are_said():
    many = [row(index, 0.3, True) for index in range(5_000)]
    assert "up to 5 of 5000 may be wrong" in str(report(many))
    assert "1 − 0.001 none of 5000 is wrong" in str(report(many, family="all"))
    assert report(many, family="all").alpha_of_each == 0.001 / 5_000
    assert report(many).alpha_of_each == 0.001


def test_all_numbers_go_into_json():
    numbers = json.loads(json.dumps(MIXED.as_dict()))
    assert numbers["smoothed"]["count"] == 2 and numbers["abstentions"]["count"] == 1
    assert [point["radius"] for point in numbers["curve"]] == MIXED.usual_radii
    assert MIXED.usual_radii[0] == 0 and MIXED.usual_radii[-1] <= MIXED.largest_radius
    assert numbers["images"][0] == {
        "index": 0,
        "label": 1,
        "prediction": 1,
        "choice": 1,
        "count": 90,
        "samples": 100,
        "p_low": 0.8,
        "radius": 0.3,
        "right": True,
    }
    few = report([row(0, 0.0, False, abstains=True)], samples=5)  # too few to prove anything
    assert few.largest_radius == 0 and few.usual_radii == [0]
    json.dumps(few.as_dict())


def test_for_all_at_once_each_certificate_has_its_part_of_alpha():
    images = torch.full((20, 1), 0.4, dtype=torch.float64)
    data = images, torch.ones(20, dtype=torch.int64)
    options = {"sigma": SIGMA, "samples": 200, "alpha": 0.01}

    def model(x):
        return torch.cat([-x, x], 1)

    each = certify(model, data, **options)
    together = certify(model, data, family="all", **options)
    for one, other in zip(each.certificates, together.certificates, strict=True):
        assert one.count == other.count
        assert one.p_low == lower_bound(one.count, 200, 0.01)
        assert other.p_low == lower_bound(one.count, 200, 0.01 / 20) < one.p_low
    assert together.mean_radius < each.mean_radius


def test_where_the_model_abstains_on_most_images_it_says_what_to_do():
    images = torch.zeros(6, 1, dtype=torch.float64)
    images[:2] = 0.95
    data = images, torch.ones(6, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(1, 2)).double()
    nn.init.zeros_(model[0].bias)
    model[0].weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
    most = certify(model, data, sigma=SIGMA, samples=100)
    assert most.abstentions.count == 4
    assert "train with Gaussian noise of the same sigma (0.5)" in str(most)
    few = certify(model, data, sigma=SIGMA, samples=100, limit=3)
    assert "train with" not in str(few)
